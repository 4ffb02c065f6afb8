"""Tables of names: lookup, messages, plugins."""

from __future__ import annotations

import dataclasses
import pickle
from collections import OrderedDict
from typing import Any

import pytest

from minigpt4.errors import UnknownNameError
from minigpt4.registry import REGISTRIES, Component, Registry, nearest


@pytest.fixture
def shapes() -> Registry:
    return Registry("shape", {"ordered": "collections:OrderedDict", "absent": "no_such_module_xyz:Thing"})


def test_resolves_on_first_use(shapes: Registry) -> None:
    assert shapes.get("ordered") is OrderedDict
    assert shapes.get("ordered") is OrderedDict
    assert shapes.names() == ["absent", "ordered"]
    assert "ordered" in shapes
    assert ["ordered"] not in shapes
    assert repr(shapes) == "Registry('shape', ['absent', 'ordered'])"


def test_an_entry_nobody_asks_for_is_not_imported(shapes: Registry) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module_xyz"):
        shapes.get("absent")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("orderd", "unknown shape 'orderd'. Did you mean 'ordered'? Known: absent, ordered"),
        ("zzz", "unknown shape 'zzz'. Known: absent, ordered"),
        ([], "unknown shape []. Known: absent, ordered"),
    ],
)
def test_unknown_name(shapes: Registry, name: str, message: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        shapes.get(name)
    assert str(caught.value) == message


def make() -> Any:
    class Mine:
        pass

    return Mine


def test_a_plugin_registers_and_may_be_imported_again(shapes: Registry) -> None:
    first, second = make(), make()
    assert shapes.register("mine")(first) is first
    assert shapes.get("mine") is first
    shapes.register("mine")(second)
    assert shapes.get("mine") is second


def test_a_taken_name_is_refused(shapes: Registry) -> None:
    with pytest.raises(UnknownNameError, match="shape 'ordered' is already registered by collections:OrderedDict"):
        shapes.register("ordered")(make())
    shapes.register("ordered")(OrderedDict)


def test_nearest() -> None:
    assert nearest("sed", ["seed", "rate"]) == "seed"
    assert nearest("zzz", ["seed", "rate"]) is None


def test_settings_are_found_without_the_class() -> None:
    table = Registry("shape", {"here": ("no_such_module_xyz:Thing", "collections:OrderedDict")})
    assert table.settings("here") is OrderedDict
    with pytest.raises(ModuleNotFoundError, match="no_such_module_xyz"):
        table.get("here")


def test_the_settings_of_a_plugin_are_its_dataclass(shapes: Registry) -> None:
    mine = shapes.register("mine")(make())
    with pytest.raises(UnknownNameError, match="Mine has no dataclass Config"):
        shapes.settings("mine")
    mine.Config = dataclasses.make_dataclass("Config", ["size"])
    assert shapes.settings("mine") is mine.Config


@pytest.mark.parametrize("kind", [name for name, table in REGISTRIES.items() if table.names()])
def test_every_entry_is_there_and_knows_its_settings(kind: str) -> None:
    for name in REGISTRIES[kind].names():
        entry = REGISTRIES[kind].get(name)
        if isinstance(entry, type) and hasattr(entry, "Config"):
            assert REGISTRIES[kind].settings(name) is entry.Config


def test_a_component_can_be_sent_to_a_worker() -> None:
    sent = pickle.loads(pickle.dumps(Component(Registry("shape", {}), "x", {"a": 1})))
    assert (sent.type, sent.config) == ("x", {"a": 1})
