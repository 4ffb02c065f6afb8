"""Every message about a value, once; and that all of them come together."""

from __future__ import annotations

from pathlib import Path

import pytest

from minigpt4.config import find_config
from minigpt4.config.reading import read_config, read_values
from minigpt4.errors import ConfigError

from .conftest import Refuse, Write
from .parts import GOOD, Small

MODEL = GOOD[: GOOD.index("run:")]
RUN = GOOD[GOOD.index("run:") :]
PART = "c.yaml:2: "


def tracking(text: str) -> str:
    return f"{GOOD}tracking:\n  {text}\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        # keys
        (GOOD + "trackin: {}\n", "c.yaml:9: unknown key 'trackin'; did you mean 'tracking'?"),
        (tracking("loow: 1"), "c.yaml:10: unknown key 'tracking.loow'; did you mean 'low'?"),
        (GOOD + "  zzz: 1\n", "unknown key 'run.zzz'; known here: device, output_dir, part, rate, seed"),
        (GOOD + "compat: publish\n", "c.yaml:9: compat must be one of ours, published, found 'publish'"),
        (GOOD + "compat: [ours]\n", "c.yaml:9: compat must be one of ours, published, found ['ours']"),
        # plain values
        (tracking("low: x"), "c.yaml:10: tracking.low must be a whole number, found 'x'"),
        (tracking("low: 1.5"), "tracking.low must be a whole number, found 1.5"),
        (tracking("low: true"), "tracking.low must be a whole number, found true"),
        (tracking("low: null"), "tracking.low must be a whole number, found null"),
        (tracking("low:"), "tracking.low must be a whole number, found null"),
        (tracking("flag: 3.5"), "tracking.flag must be true or false, found 3.5"),
        (tracking("text: null"), "tracking.text must be text, found null"),
        (tracking("text: [a]"), "tracking.text must be text, found ['a']"),
        (tracking("text: 1.10"), "tracking.text must be text, found 1.1; put it in quotes"),
        (tracking("note: yes"), "tracking.note must be text, found true; put it in quotes"),
        (tracking("count: x"), "tracking.count must be a whole number, found 'x'"),
        (tracking("pair: [1]"), "tracking.pair has the wrong number of values, found [1]"),
        (tracking("pair: 1"), "tracking.pair must be a list, found 1"),
        (tracking("names: {a: 1}"), "tracking.names must be a list, found {'a': 1}"),
        (tracking("names: a"), "tracking.names must be a list, found 'a'"),
        (tracking("grid:\n  - [1]\n  - [2, x]"), "c.yaml:12: tracking.grid.1.1 must be a whole number, found 'x'"),
        (tracking("scores:\n    a: b"), "c.yaml:11: tracking.scores.a must be a number, found 'b'"),
        (tracking("scores: 3"), "tracking.scores must be a mapping, found 3"),
        (tracking("either: [1]"), "tracking.either must be a whole number or text, found [1]"),
        (tracking("low: 11"), "c.yaml:10: tracking.low must be at most 10, found 11"),
        (tracking("high: -1"), "c.yaml:9: tracking: high must not be below low, found -1"),
        (GOOD + "  rate: -1\n", "c.yaml:9: run.rate must be at least 0, found -1"),
        (GOOD + "  rate: .nan\n", "c.yaml:9: run.rate must be a finite number, found nan"),
        (tracking("pair: [1, .inf]"), "tracking.pair.1 must be a finite number, found inf"),
        (tracking("low: {a: 1}"), "tracking.low must be a whole number, found {'a': 1}"),
        (tracking("low: [x"), "not valid YAML"),
        (tracking(f"low: {'x' * 100}"), f"found '{'x' * 76}..."),
        (GOOD + "  device: gpu\n", "c.yaml:9: run.device must be one of auto, cpu, found 'gpu'"),
        (GOOD + "  part: wav\n", "run.part must be one of bare, stone, wave, found 'wav'; did you mean 'wave'?"),
        # what is required
        (MODEL + "run: {seed: 1}\n", "c.yaml:7: run.output_dir is required: set it in the YAML or pass --options"),
        (MODEL + "run: {output_dir: '???'}\n", "pass --options run.output_dir=VALUE"),
        (MODEL + "run: {output_dir: null}\n", "run.output_dir must be text, found null"),
        (
            GOOD.replace("    weights: random\n", ""),
            PART + "model.part.weights is required: set it in the YAML or pass --options model.part.weights=PATH",
        ),
        (RUN + "model:\n  part: {type: wave}\n", "model.inner.depth is required"),
        (RUN + "model:\n  inner: {depth: 1}\n", "model.part.type is required, one of bare, stone, wave"),
        (RUN + "model:\n  inner: {depth: 1}\n", "pass --options model.part.type=NAME"),
        # sections and components
        (GOOD + "tracking: 3\n", "c.yaml:9: tracking must be a mapping, found 3"),
        (GOOD + "tracking: '???'\n", "c.yaml:9: tracking must be a mapping, found '???'"),
        (GOOD.replace("stone", "ston"), "model.part.type: unknown part 'ston'. Did you mean 'stone'? Known: bare"),
        (GOOD.replace("stone", "[a]"), "c.yaml:3: model.part.type: unknown part ['a']"),
        (GOOD.replace("stone", "bare"), "c.yaml:3: model.part.type: Bare has no dataclass Config"),
        (MODEL + "  other: 3\n" + RUN, "c.yaml:7: model.other must be a mapping with a type, found 3"),
        (MODEL + "  other: null\n" + RUN, "c.yaml:7: model.other must be a mapping with a type, found null"),
        (MODEL + "  many: [a]\n" + RUN, "c.yaml:7: model.many must be a mapping, found ['a']"),
        (MODEL + "  many:\n    a: {}\n" + RUN, "c.yaml:8: model.many.a.type is required"),
        (
            MODEL + "  many:\n    a: {type: wave, lenght: 1}\n" + RUN,
            "c.yaml:8: unknown key 'model.many.a.lenght'; did you mean 'length'?",
        ),
        (MODEL + "  layers: [{depth: 1}, {depth: x}]\n" + RUN, "model.layers.1.depth must be a whole number"),
        (MODEL + "  layers: [3]\n" + RUN, "c.yaml:7: model.layers.0 must be a mapping, found 3"),
        # placeholders
        (tracking("text: /path/to/vicuna"), "c.yaml:10: tracking.text is still a placeholder, '/path/to/vicuna': set"),
        (tracking("file: path/to/x"), "or pass --options tracking.file=PATH"),
        (tracking("names: [a, ./path/to/x]"), "tracking.names.1 is still a placeholder, './path/to/x'"),
        # interpolation
        (tracking("text: ${run.sead}"), "c.yaml:10: tracking.text: Interpolation key 'run.sead' not found"),
        (tracking("low: ${tracking.low}"), "c.yaml:10: tracking.low: Recursive interpolation detected"),
        (tracking("names: [a, '${x}']"), "c.yaml:10: tracking.names.1: Interpolation key 'x' not found"),
        (tracking("text: ${oc.env:MINIGPT4_NO_SUCH}"), "Environment variable 'MINIGPT4_NO_SUCH' not found"),
        (GOOD.replace("stone", "${x}"), "c.yaml:3: model.part.type: Interpolation key 'x' not found"),
        # plugins
        (GOOD + "plugins: [not_a_module_xyz]\n", "c.yaml:9: plugins: cannot import 'not_a_module_xyz': No module"),
        (GOOD + "plugins: {a: 1}\n", "c.yaml:9: plugins must be a list of modules, found {'a': 1}"),
    ],
)
def test_one_problem_one_message(refuse: Refuse, text: str, problem: str) -> None:
    problems = refuse(text)
    assert len(problems) == 1, problems
    assert problem in problems[0]
    assert problems[0].startswith("c.yaml:")


def test_all_problems_come_at_once(refuse: Refuse) -> None:
    problems = refuse("model: {}\nrun: {sed: 1}\nrum: 1\ncompat: x\nplugins: [nope_xyz]\n", "a", "run.rate=b")
    assert len(problems) == 9
    assert str(ConfigError(problems)).startswith("9 problems in the configuration:\n")


def test_one_problem_has_no_heading(refuse: Refuse) -> None:
    (problem,) = refuse(GOOD, "oops")
    assert str(ConfigError(problem)) == problem


def test_what_points_to_a_required_value_adds_no_noise(refuse: Refuse) -> None:
    (problem,) = refuse(MODEL + "run: {output_dir: '???'}\ntracking: {text: '${run.output_dir}', low: 2}\n")
    assert "run.output_dir is required" in problem


def test_an_inner_value_of_an_option_names_the_option(refuse: Refuse) -> None:
    assert refuse(tracking("low: 1"), "tracking={low: x, grid: [[y]]}") == [
        "--options tracking={low: x, grid: [[y]]}: tracking.grid.0.0 must be a whole number, found 'y'",
        "--options tracking={low: x, grid: [[y]]}: tracking.low must be a whole number, found 'x'",
    ]


def test_a_place_forgotten_with_its_component_is_not_blamed(write: Write) -> None:
    write(GOOD.replace("random", "'???'"), "parent.yaml")
    write("extends: parent.yaml\nmodel:\n  part: {type: wave}\n", "child.yaml")
    child = write("extends: child.yaml\n\nmodel:\n  part: {type: stone}\n")
    with pytest.raises(ConfigError, match=r"^c\.yaml:4: model\.part\.weights is required"):
        read_config(Small, child)


def test_values_without_a_file_name_their_source() -> None:
    with pytest.raises(
        ConfigError,
        match=r"step_3/config: unknown key 'rum'; did you mean 'run'\?\nstep_3/config: section 'run' is required$",
    ):
        read_values(Small, {"rum": {}, "model": {"part": {"type": "wave"}, "inner": {"depth": 1}}}, "step_3/config")


class TestFindConfig:
    def test_no_such_file(self) -> None:
        with pytest.raises(ConfigError, match=r"^no config file 'a/b\.yaml'\..* Shipped: "):
            read_config(Small, "a/b.yaml")

    def test_a_folder(self) -> None:
        Path("here").mkdir()
        with pytest.raises(ConfigError, match=r"^'here' is a folder, not a config file\. "):
            read_config(Small, "here")

    @pytest.mark.parametrize("name", ["first", "first.yaml", "configs/first", "configs/first.yaml", "second", "v1.5"])
    def test_shipped_names(self, name: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        for file in ("minigpt4/shipped/configs/first", "eval_configs/first", "eval_configs/second", "configs/v1.5"):
            write(GOOD, f"minigpt4/shipped/{file.removeprefix('minigpt4/shipped/')}.yaml")
        monkeypatch.setattr("minigpt4.config.paths._PACKAGE", Path("minigpt4"))
        folder = "eval_configs" if name == "second" else "configs"
        file = f"minigpt4/shipped/{folder}/{Path(name).name.removesuffix('.yaml')}.yaml"
        assert read_config(Small, name).run.output_dir == "out"
        assert find_config(name) == Path(file)
        with pytest.raises(ConfigError, match="Did you mean 'first'"):
            read_config(Small, "fist")
