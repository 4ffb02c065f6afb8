"""`model.start.ridge` in a run: computed once, before the first step, the same on every rank, and never again."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minigpt4.config import load_config
from minigpt4.errors import ConfigError
from minigpt4.runners.cache import CacheRunner
from tests.conftest import COLOURS
from tests.runners.parts import assert_same_training, series, train, train_on_ranks, weights, write

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def many_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an aligned set: 48 plain images, lighter and darker, each with its colour in its caption."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "image").mkdir()
    rows = []
    for n in range(48):
        name, colour = list(COLOURS.items())[n % len(COLOURS)]
        Image.new("RGB", (30, 30), tuple(max(0, c - n // 4) for c in colour)).save(folder / "image" / f"{n}.jpg")
        rows.append({"image_id": str(n), "caption": f"the image is {name}"})
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": rows}))
    return folder


@pytest.fixture
def start_values(tiny_values: dict[str, Any], many_pairs: Path) -> dict[str, Any]:
    """Values of a run that starts in closed form."""
    tiny_values["model"]["start"] = {"ridge": 48}
    tiny_values["datasets"]["train"]["pairs"]["path"] = str(many_pairs)
    return tiny_values


def test_a_run_starts_in_closed_form_and_says_of_what(start_values, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "minigpt4"):
        train(start_values, tmp_path / "run", total_steps=1, learning_rate=0.0, warmup_start_learning_rate=0.0)
    (line,) = [text for text in caplog.messages if "closed-form start" in text]
    assert "llama_proj from 48 samples (0 of 48 unused)" in line
    started = weights(tmp_path / "run")
    del start_values["model"]["start"]
    train(start_values, tmp_path / "plain", total_steps=1, learning_rate=0.0, warmup_start_learning_rate=0.0)
    assert not torch.equal(started["llama_proj.weight"], weights(tmp_path / "plain")["llama_proj.weight"])


def test_a_resumed_run_and_a_second_stage_do_not_compute_it_again(start_values, tmp_path, caplog):
    whole = tmp_path / "whole"
    train(start_values, whole)
    train(start_values, tmp_path / "parts", total_steps=4, save_every_steps=2)
    broken = tmp_path / "parts/checkpoints/step_4"
    (broken / "manifest.json").unlink()
    caplog.clear()
    with caplog.at_level(logging.INFO, "minigpt4"):
        train(start_values, tmp_path / "parts", resume=True)
        assert [text for text in caplog.messages if "resumed from" in text]
        start_values["model"]["init_from"] = str(whole / "checkpoints/latest")
        train(start_values, tmp_path / "second", total_steps=1, learning_rate=0.0, warmup_start_learning_rate=0.0)
    assert not [text for text in caplog.messages if "closed-form" in text]
    assert series(tmp_path / "parts") == series(whole)
    first, second = weights(whole), weights(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_ranks_start_as_one(start_values, tmp_path):
    train(start_values, tmp_path / "one")
    file = write(start_values, tmp_path / "two", batch_size_per_rank=2)
    assert train_on_ranks([file, file]) == [0, 0]
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_cached_features_give_the_same_start(start_values, tmp_path):
    train(start_values, tmp_path / "images")
    start_values["datasets"]["feature_cache"] = str(tmp_path / "cache")
    CacheRunner.from_config(load_config(write(start_values, tmp_path / "job")), "float32", batch_size=16).run()
    train(start_values, tmp_path / "cached")
    assert_same_training(tmp_path / "images", tmp_path / "cached")


@pytest.mark.parametrize("projector", [{"type": "mlp"}, {"bias": False}])
def test_other_projectors_are_refused(start_values, tmp_path, projector):
    start_values["model"]["projector"] = projector
    with pytest.raises(ConfigError, match=r"model\.start\.ridge: sets one linear layer with a bias"):
        train(start_values, tmp_path / "run")


def test_images_are_needed(start_values, tmp_path):
    rows = tmp_path / "rows.jsonl"
    text = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    rows.write_text(json.dumps(text) + "\n")
    start_values["datasets"]["train"] = {"t": {"type": "conversations", "path": str(rows), "images": "optional"}}
    with pytest.raises(ConfigError, match=r"none of the first 48 training samples has exactly one image"):
        train(start_values, tmp_path / "run")


def test_a_negative_number_is_refused(start_values, tmp_path):
    start_values["model"]["start"]["ridge"] = -1
    with pytest.raises(ConfigError, match=r"model\.start\.ridge"):
        load_config(write(start_values, tmp_path / "run"))


def test_without_content_words_the_run_says_so_and_starts_at_random(start_values, tmp_path, caplog, pairs):
    start_values["datasets"]["train"]["pairs"]["path"] = str(pairs)
    train(start_values, tmp_path / "run", total_steps=1)
    assert [text for text in caplog.messages if "keeps its random start" in text]
    del start_values["model"]["start"]
    train(start_values, tmp_path / "plain", total_steps=1)
    assert_same_training(tmp_path / "run", tmp_path / "plain")
