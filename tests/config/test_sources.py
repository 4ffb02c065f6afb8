"""Files, `extends:` and `--options`: what is merged, and what is said when it cannot be."""

from __future__ import annotations

import pytest

from minigpt4.config.reading import read_config
from minigpt4.errors import ConfigError

from .conftest import Load, Refuse, Write
from .parts import GOOD, Small


class TestExtends:
    def test_a_child_overrides_keys_and_keeps_the_rest(self, write: Write) -> None:
        write(GOOD + "  seed: 1\n  rate: 0.5\n", "base/parent.yaml")
        config = read_config(Small, write("extends: base/parent.yaml\nrun: {seed: 2}\n"))
        assert (config.run.seed, config.run.rate, config.run.output_dir) == (2, 0.5, "out")

    def test_parents_are_relative_to_their_own_file_and_the_later_one_wins(self, write: Write) -> None:
        write(GOOD, "base/deep/root.yaml")
        write("extends: deep/root.yaml\nrun: {seed: 1, rate: 0.1}\n", "base/one.yaml")
        write("run: {seed: 2}\n", "base/two.yaml")
        config = read_config(Small, write("extends: [base/one.yaml, base/two.yaml]\n"))
        assert (config.run.seed, config.run.rate) == (2, 0.1)

    def test_two_children_may_share_a_grandparent(self, write: Write) -> None:
        write(GOOD, "root.yaml")
        write("extends: root.yaml\n", "one.yaml")
        write("extends: root.yaml\n", "two.yaml")
        assert read_config(Small, write("extends: [one.yaml, two.yaml]\n")).run.output_dir == "out"

    def test_lists_are_replaced(self, write: Write) -> None:
        write(GOOD + "tracking: {names: [a, b, c]}\n", "parent.yaml")
        config = read_config(Small, write("extends: parent.yaml\ntracking: {names: [z]}\n"))
        assert config.tracking.names == ("z",)

    def test_null_takes_an_inherited_section_away(self, write: Write) -> None:
        write(GOOD + "tracking: {low: 3}\n", "parent.yaml")
        config = read_config(Small, write("extends: parent.yaml\ntracking:\n"))
        assert config.tracking.low == 0

    def test_another_type_replaces_the_whole_component(self, write: Write) -> None:
        write(GOOD, "parent.yaml")
        child = write("extends: parent.yaml\nmodel: {part: {type: wave, length: 9}}\n")
        config = read_config(Small, child)
        assert config.values["model"]["part"] == {"type": "wave", "length": 9, "name": "wave"}

    def test_the_same_type_or_none_is_merged(self, write: Write) -> None:
        write(GOOD, "parent.yaml")
        child = write("extends: parent.yaml\nmodel: {part: {grams: 2}}\n")
        part = read_config(Small, child, ["model.part.type=stone"]).model.part.config
        assert (part.weights, part.grams) == ("random", 2.0)

    def test_a_required_mark_keeps_what_the_parent_says(self, write: Write) -> None:
        write(GOOD, "parent.yaml")
        child = write("extends: parent.yaml\nrun: {output_dir: '???'}\n")
        assert read_config(Small, child).run.output_dir == "out"

    def test_a_problem_names_the_file_it_stands_in(self, write: Write) -> None:
        write(GOOD + "  sed: 3\n", "parent.yaml")
        child = write("extends: parent.yaml\ntracking:\n  loww: 1\n")
        with pytest.raises(ConfigError) as caught:
            read_config(Small, child)
        assert caught.value.problems == [
            "parent.yaml:9: unknown key 'run.sed'; did you mean 'seed'?",
            "c.yaml:3: unknown key 'tracking.loww'; did you mean 'low'?",
        ]

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (
                {"c.yaml": "\nextends: gone.yaml"},
                "c.yaml:2: extends 'gone.yaml', but there is no file 'gone.yaml'",
            ),
            ({"c.yaml": "extends: [a/b.yaml]"}, "c.yaml:1: extends 'a/b.yaml', but there is no file 'a/b.yaml'"),
            ({"c.yaml": "extends: c.yaml"}, "c.yaml:1: extends itself: c.yaml -> c.yaml"),
            (
                {"c.yaml": "extends: d.yaml", "d.yaml": "\nextends: ./c.yaml"},
                "d.yaml:2: extends itself: c.yaml -> d.yaml -> c.yaml",
            ),
            ({"c.yaml": "extends: 3"}, "c.yaml:1: extends must be a file or a list of files, found 3"),
            ({"c.yaml": "extends: [{a: 1}]"}, "extends must be a file or a list of files, found [{'a': 1}]"),
            ({"c.yaml": "run:\n  a: [1\n"}, "c.yaml:3: not valid YAML: expected ',' or ']'"),
            ({"c.yaml": "run: {seed: ???}\n"}, "inside { } and [ ] write '???' in quotes"),
            ({"c.yaml": "run:\n\tseed: 1\n"}, "c.yaml:2: not valid YAML: "),
            ({"c.yaml": "run: 1\nmodel: 2\nrun: 3\n"}, "c.yaml:3: not valid YAML: found duplicate key run"),
            ({"c.yaml": "- a\n- b\n"}, "c.yaml: the top level must be a mapping of sections, found a list"),
            ({"c.yaml": "just text"}, "c.yaml: the top level must be a mapping of sections, found 'just text'"),
            ({"c.yaml": "run:\n  1: a\n"}, "c.yaml:2: the key '1' must be text without a dot (quote a number)"),
            ({"c.yaml": "run.seed: 1\n"}, "c.yaml:1: the key 'run.seed' must be text without a dot"),
            ({"c.yaml": "run: &a\n  b: *a\n"}, "c.yaml:1: an alias contains itself"),
            ({"c.yaml": "run: {seed: '${run'}\n"}, "c.yaml: "),
        ],
    )
    def test_unreadable(self, write: Write, files: dict[str, str], message: str) -> None:
        for name, text in files.items():
            write(text, name)
        with pytest.raises(ConfigError) as caught:
            read_config(Small, "c.yaml")
        assert message in str(caught.value)

    def test_a_file_that_is_no_text(self, write: Write) -> None:
        write("").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match=r"c\.yaml: cannot be read: "):
            read_config(Small, "c.yaml")

    def test_anchors_and_merge_keys_work(self, load: Load) -> None:
        text = GOOD + "tracking: &shared {low: 2}\n"
        assert load(
            text.replace("  inner:\n    depth: 2", "  inner: &i {depth: 2}\n  layers: [{<<: *i}]")
        ).model.layers[0].depth == (2)


class TestOptions:
    @pytest.mark.parametrize(
        ("option", "path", "value"),
        [
            ("run.seed=3", "run.seed", 3),
            (" run.seed = 3", "run.seed", 3),
            ("run.rate=1e-4", "run.rate", 1e-4),
            ("run.output_dir=a=b=c", "run.output_dir", "a=b=c"),
            ("run.output_dir=http://x?a=1", "run.output_dir", "http://x?a=1"),
            ("run.output_dir='12'", "run.output_dir", "12"),
            ("run.output_dir=''", "run.output_dir", ""),
            ("tracking.note=null", "tracking.note", None),
            ("tracking.note=???x", "tracking.note", "???x"),
            ("tracking.flag=yes", "tracking.flag", True),
            ("tracking.names=[x, y]", "tracking.names", ("x", "y")),
            ("tracking.anything={a: {b: 1e-3}}", "tracking.anything", {"a": {"b": 1e-3}}),
            ("tracking={low: 2}", "tracking.low", 2),
            ("model.layers.1.depth=7", "model.layers.1.depth", 7),
            ("model.layers.0={depth: 7}", "model.layers.0.depth", 7),
            ("model.many.new.type=wave", "model.many.new.config.length", 3),
            ("compat=published", "compat", "published"),
        ],
    )
    def test_sets_a_value(self, load: Load, option: str, path: str, value: object) -> None:
        text = GOOD.replace("  inner:", "  layers: [{depth: 0}, {depth: 1}]\n  inner:")
        found: object = load(text, option)
        for name in path.split("."):
            if isinstance(found, dict):
                found = found[name]
            else:
                found = found[int(name)] if isinstance(found, list) else getattr(found, name)
        assert found == value
        assert type(found) is type(value)

    def test_a_key_set_twice_is_refused(self, refuse: Refuse) -> None:
        problem = "--options run.seed=2: run.seed is already set by run.seed=1; quote lists with braces"
        assert refuse(GOOD, "run.seed=1", "run.seed=2") == [problem]

    def test_the_same_option_twice_is_accepted(self, load: Load) -> None:
        assert load(GOOD, "run.seed=1", "run.seed=1").run.seed == 1

    @pytest.mark.parametrize(
        "options",
        [
            ("model.part.type=wave", "model.part.length=8"),
            ("model.part.length=8", "model.part.type=wave"),
            ("model.part={type: wave, length: 8}",),
        ],
    )
    def test_another_type_empties_the_component(self, load: Load, options: tuple[str, ...]) -> None:
        assert load(GOOD, *options).values["model"]["part"] == {"type": "wave", "length": 8, "name": "wave"}

    @pytest.mark.parametrize(
        ("option", "problem"),
        [
            ("run.seed", "must have the form section.key=value"),
            ("run.seed=", "must have the form section.key=value"),
            ("=3", "must have the form section.key=value"),
            ("run..seed=3", "must have the form section.key=value"),
            ("run.names=[1", "the value is not valid YAML; quote it"),
            ("run.output_dir.deep=3", "run.output_dir is 'out', not a section"),
            ("tracking.names.2=x", "tracking.names is a list of 2 items, counted from 0; there is no item '2'"),
            ("tracking.names.-1=x", "there is no item '-1'"),
            ("tracking.names.a.b=x", "there is no item 'a'"),
        ],
    )
    def test_refused(self, refuse: Refuse, option: str, problem: str) -> None:
        found = refuse(GOOD + "tracking: {names: [a, b]}\n", option)
        assert len(found) == 1
        assert found[0].startswith(f"--options {option}: ")
        assert problem in found[0]

    def test_a_problem_with_the_value_names_the_option(self, refuse: Refuse) -> None:
        assert refuse(GOOD, "run.sed=3", "run.rate=fast") == [
            "--options run.sed=3: unknown key 'run.sed'; did you mean 'seed'?",
            "--options run.rate=fast: run.rate must be a number, found 'fast'",
        ]
