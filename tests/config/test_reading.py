"""What a loaded config holds, and that it survives being saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt4.config import missing_files
from minigpt4.config.reading import read_config, read_values
from minigpt4.errors import ConfigError
from minigpt4.registry import Component

from .conftest import Load, Write
from .parts import GOOD, PARTS, Small, Stone, Wave


def test_types_and_defaults(load: Load) -> None:
    config = load(GOOD)
    assert config.model.part == Component(PARTS, "stone", Stone.Config(weights="random"))
    assert config.model.other == Component(PARTS, "wave", Wave.Config())
    assert (config.model.extra, config.model.many, config.model.layers) == (None, {}, [])
    assert config.run.rate == 1e-4
    assert config.tracking.pair == (0.9, 0.999)
    assert config.tracking.folder == Path("here")
    assert (config.compat, config.plugins) == ("ours", ())


def test_a_component_builds_its_class(load: Load) -> None:
    wave = load(GOOD, "model.other.length=5").model.other.build(tone=3)
    assert (type(wave), wave.config.length, wave.tone) == (Wave, 5, 3)


def test_whole_numbers_are_text_where_text_is_expected(load: Load) -> None:
    assert load(GOOD, "run.output_dir=2024").run.output_dir == "2024"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "tracking:\n"])
def test_an_absent_or_empty_section_holds_the_defaults(load: Load, text: str) -> None:
    assert load(GOOD + text).tracking.low == 0


def test_values_are_complete_and_paths_are_as_given(load: Load) -> None:
    values = load(GOOD, "model.part.weights=../w.safetensors").values
    assert values["model"] == {
        "part": {"type": "stone", "weights": "../w.safetensors", "grams": 1.5},
        "other": {"type": "wave", "length": 3, "name": "wave"},
        "extra": None,
        "many": {},
        "inner": {"depth": 2, "width": 4},
        "layers": [],
    }
    assert values["run"] == {"output_dir": "out", "seed": 42, "rate": 1e-4, "device": "auto", "part": "wave"}
    assert values["tracking"]["folder"] == "here"
    assert list(values) == ["compat", "plugins", "model", "run", "tracking"]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("tracking.low=${model.inner.depth}", 2),
        ("tracking.low=${model.inner.width}", 4),
        ("tracking.low=${model.other.length}", 3),
    ],
)
def test_interpolation_reaches_what_is_written_and_what_is_not(load: Load, option: str, expected: int) -> None:
    assert load(GOOD, option).tracking.low == expected


def test_interpolation_inside_text_and_escaped(load: Load) -> None:
    config = load(GOOD, "run.output_dir=runs/seed_${run.seed}", r"tracking.text=\${run.seed}")
    assert config.run.output_dir == "runs/seed_42"
    assert config.tracking.text == "${run.seed}"
    assert config.values["tracking"]["text"] == "${run.seed}"


def test_a_plugin_registers_its_class(load: Load, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("from config_test_parts import PARTS, Wave\nPARTS.register('plugged')(type('P', (Wave,), {}))\n", "plug.py")
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setattr(PARTS, "_entries", dict(PARTS._entries))
    monkeypatch.setitem(sys.modules, "config_test_parts", sys.modules[Wave.__module__])
    config = load(GOOD + "plugins: plug\n", "model.part.type=plugged")
    assert config.plugins == ("plug",)
    assert config.model.part.type == "plugged"
    assert read_values(Small, config.values, "again") == config


def assert_round_trip(config: Small) -> None:
    """A config is itself again after its values, and after its YAML."""
    assert read_values(Small, config.values, "values") == config
    file = Path("saved.yaml")
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert read_config(Small, file) == config
    assert yaml.safe_load(config.to_yaml()).keys() == config.values.keys()


TEXT = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])),
    st.text("${}\\ab.:", max_size=12),
    st.sampled_from(
        ["1e-4", "yes", "null", "~", "010", "12:30:00", "2020-01-01", "1_000", "", " a ", "#", "a: b", "!x"]
    ),
    st.sampled_from(
        ["${run.seed}", "\\${x}", "\\\\${", "a\\", "line\nbreak\n", "\ttab", "é", "###Human: <Img>", "=", "<<"]
    ),
).filter(lambda text: text != "???" and not text.lstrip("./").startswith("path/to"))
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
KEY = st.text("abcxyz_", min_size=1)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=6,
)
TRACKING = st.fixed_dictionaries(
    {},
    optional={
        "flag": st.booleans(),
        "text": TEXT,
        "note": st.none() | TEXT,
        "count": st.none() | st.integers(),
        "pair": st.lists(NUMBER, min_size=2, max_size=2),
        "names": st.lists(TEXT, max_size=3),
        "grid": st.lists(st.lists(st.integers(), max_size=3), max_size=3),
        "scores": st.dictionaries(KEY, NUMBER, max_size=3),
        "anything": st.dictionaries(KEY, ANYTHING, max_size=3),
        "either": st.integers() | TEXT,
        "low": st.integers(max_value=10),
    },
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tracking=TRACKING, depth=st.integers(), many=st.dictionaries(KEY, st.integers(), max_size=3))
@pytest.mark.slow
def test_round_trip(tracking: dict[str, Any], depth: int, many: dict[str, int]) -> None:
    model = {
        "part": {"type": "wave"},
        "inner": {"depth": depth},
        "layers": [{"depth": depth}],
        "many": {name: {"type": "wave", "length": length} for name, length in many.items()},
    }
    values = {"model": model, "run": {"output_dir": "out"}, "tracking": {"high": 10, **tracking}}
    config = read_values(Small, values, "drawn")
    for name, value in tracking.items():
        assert config.values["tracking"][name] == value
    assert_round_trip(config)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    option=st.one_of(
        st.text(), st.tuples(st.sampled_from(["run", "run.seed", "model.layers.0", "a"]), TEXT).map("=".join)
    )
)
def test_no_option_ends_in_a_traceback(option: str) -> None:
    Path("c.yaml").write_text(GOOD, encoding="utf-8")
    problems = []
    try:
        read_config(Small, "c.yaml", [option])
    except ConfigError as error:
        problems = error.problems
    assert [problem for problem in problems if "--options" not in problem] == []


def missing(config: Any) -> list[str]:
    """Return what `missing_files` says about a config of these small sections."""
    return missing_files(config)


class TestMissingFiles:
    def test_each_missing_path_is_named_with_its_option(self, load: Load) -> None:
        options = ["model.part.weights=gone.pt", "tracking.files=[here.txt, gone.txt]", "tracking.file=gone/"]
        Path("here.txt").write_text("", encoding="utf-8")
        assert missing(load(GOOD, *options)) == [
            "model.part.weights: there is no file 'gone.pt': pass --options model.part.weights=PATH",
            "tracking.files.1: there is no file 'gone.txt': pass --options tracking.files.1=PATH",
            "tracking.file: there is no file 'gone/': pass --options tracking.file=PATH",
        ]

    def test_components_by_name_are_walked(self, load: Load) -> None:
        (line,) = missing(load(GOOD, "model.many.x={type: stone, weights: a}"))
        assert line.startswith("model.many.x.weights: ")

    @pytest.mark.parametrize(
        "path",
        [
            "random",
            "''",
            "asset:mini",
            "shipped:configs",
            "https://a/b.tar",
            "pipe:cat x",
            ".",
            "c.yaml",
            "'{00..10}.tar'",
            "'*.tar'",
        ],
    )
    def test_what_is_not_missing(self, load: Load, path: str) -> None:
        assert missing(load(GOOD, f"model.part.weights={path}")) == []

    @pytest.mark.parametrize("path", ["shipped:gone/x", "configs"])
    def test_what_is_shipped_is_looked_for_among_the_shipped(self, load: Load, path: str) -> None:
        assert len(missing(load(GOOD, f"model.part.weights={path}"))) == 1

    @pytest.mark.parametrize("path", ["gone/{00..10}.tar", "gone/a*.tar"])
    def test_the_folder_of_a_pattern_must_exist(self, load: Load, path: str) -> None:
        assert len(missing(load(GOOD, f"model.part.weights='{path}'"))) == 1
