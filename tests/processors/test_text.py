"""Captions are cleaned as the published code does."""

from __future__ import annotations

import pytest

from minigpt4.config.sections import ProcessorsConfig
from minigpt4.processors.text import BlipCaption, TextProcessor
from minigpt4.registry import PROCESSORS, Component


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A Red Bus, parked on the street!", "a red bus, parked on the street"),
        ("  Two CATS.. sleeping\n on a sofa  ", "two cats sleeping on a sofa"),
        ("it's a dog's \"life\"; isn't it? (yes) ~ #1", "it's a dog's life isn't it? yes 1"),
        ("ends with a line\n", "ends with a line"),
        ("...", ""),
        (" ".join(map(str, range(60))), " ".join(map(str, range(50)))),
    ],
)
def test_blip_caption(raw: str, clean: str) -> None:
    assert BlipCaption.from_config(BlipCaption.Config())(raw) == clean


def test_text_only_strips() -> None:
    text = TextProcessor.from_config(TextProcessor.Config())
    assert text("  As it is:  Written.\n") == "As it is:  Written."


@pytest.mark.parametrize("cls", [TextProcessor, BlipCaption])
def test_max_words(cls: type[TextProcessor]) -> None:
    assert cls.from_config(cls.Config(max_words=2))("one two three") == "one two"
    long = " ".join(["word"] * 80)
    assert cls.from_config(cls.Config(max_words=0))(long) == long
    with pytest.raises(ValueError, match="max_words"):
        cls.Config(max_words=-1)


def test_the_registry_finds_every_processor() -> None:
    for name in PROCESSORS.names():
        assert hasattr(PROCESSORS.get(name), "Config")
    component = Component(PROCESSORS, "blip_caption", BlipCaption.Config())
    assert component.build()("A CAT.") == "a cat"
    assert list(ProcessorsConfig.__dataclass_fields__) == ["image"]
