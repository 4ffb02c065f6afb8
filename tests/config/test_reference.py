"""The reference of all keys is complete, and its page is current."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from minigpt4.config import Config
from minigpt4.config.reference import as_markdown, blocks, describe
from minigpt4.errors import ConfigError
from minigpt4.registry import REGISTRIES


def test_every_key_of_every_section_and_part_is_described() -> None:
    found = list(blocks())
    assert [key.name for block in found for key in block.keys if not key.meaning] == []
    assert [block.name for block in found if not block.meaning] == []
    described = {(block.name.rpartition(".")[2], block.type) for block in found}
    sections = {spec.name for spec in dataclasses.fields(Config)} - {"compat", "plugins"}
    assert {name for name, kind in described if not kind} >= sections
    parts = ("vision_encoders", "resamplers", "language_models", "datasets", "processors")
    assert {kind for _, kind in described} >= {name for part in parts for name in REGISTRIES[part].names()}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("run.seed", "run.seed  (whole number, at least 0; default: 42)\n      Seed of data order"),
        ("run", 'run.precision  (one of auto, fp32, bf16, fp16; default: "auto")'),
        ("model", "model.resampler.components  (whole number, at least 1; default: 32)"),
        ("datasets.train", "datasets.train.NAME.urls  (list of paths; default: required)"),
        ("demo.examples", "demo.examples.0.question  (text; default: required)"),
    ],
)
def test_a_key_is_found(path: str, text: str) -> None:
    assert text in describe(path)
    assert len(describe(path)) < len(describe())


def test_an_unknown_key_has_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'run\.sed'\. Did you mean 'run\.seed'\?"):
        describe("run.sed")


def test_the_page_is_current() -> None:
    page = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == as_markdown(), "run: python -m minigpt4 config --markdown > docs/config.md"
