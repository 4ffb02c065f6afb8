"""The image-shuffle control: it must fail on a model that ignores its images, and on no other."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minigpt4.batch import Batch
from minigpt4.checkpoints.assemble import assemble
from minigpt4.config import load_config
from minigpt4.datasets.loader import fixed_batches
from minigpt4.runners.validation import Validation, shuffle_images
from tests.conftest import COLOURS, read_metrics
from tests.runners.parts import train

pytestmark = pytest.mark.slow

SAID = dict(zip(COLOURS, ("yes", "no", "cat", "dog"), strict=True))


def colour_questions(folder: Path, prompt_tells: bool) -> dict[str, Any]:
    """Return a data set whose answer is the image's colour in code, or a word that the question holds already.

    In the second case every word comes with every colour once, so that the image tells nothing.
    """
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (30, 30), colour).save(folder / f"{name}.png")
    names, rows = list(COLOURS), []
    for number in range(16):
        answer = SAID[names[number % 4]]
        image = names[(number + number // 4) % 4 if prompt_tells else number % 4]
        asked = {"from": "human", "value": f"<image>\n{f'say {answer}' if prompt_tells else 'what is it?'}"}
        rows.append({"image": f"{image}.png", "conversations": [asked, {"from": "gpt", "value": answer}]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return {"type": "conversations", "path": str(folder / "rows.json")}


@pytest.mark.parametrize("text_tells", [False, True])
def test_the_run_says_whether_the_model_looks_at_its_images(tiny_values, tmp_path, text_tells):
    data = colour_questions(tmp_path / "data", text_tells)
    tiny_values["datasets"] = {"train": {"one": data}, "validation": {"one": data}}
    train(tiny_values, tmp_path / "run", total_steps=100, learning_rate=3e-2, save_every_steps=0)
    last = read_metrics(tmp_path / "run")[-1]
    worse = last["validation_loss_shuffled_images"] / last["validation_loss"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert ("ignores its images" in log) == text_tells
    assert worse < 1.01 if text_tells else worse > 1.3


def test_validation_runs_when_due_and_at_the_end_on_the_same_samples(tiny_values, tmp_path):
    tiny_values["datasets"]["validation"] = tiny_values["datasets"]["train"]
    run = {"total_steps": 5, "validate_every_steps": 2, "learning_rate": 0.0, "warmup_start_learning_rate": 0.0}
    train(tiny_values, tmp_path / "run", min_learning_rate=0.0, **run)
    found = [line for line in read_metrics(tmp_path / "run") if "validation_loss" in line]
    assert [line["step"] for line in found] == [2, 4, 5]
    assert len({line["validation_loss"] for line in found}) == 1


def test_validation_does_not_disturb_training(tiny_values, tmp_path):
    train(tiny_values, tmp_path / "without")
    tiny_values["datasets"]["validation"] = tiny_values["datasets"]["train"]
    train(tiny_values, tmp_path / "with", validate_every_steps=1)
    without = [line["loss"] for line in read_metrics(tmp_path / "without")]
    assert [line["loss"] for line in read_metrics(tmp_path / "with") if "loss" in line] == without


def test_an_empty_validation_set_is_an_error(tiny_values, tmp_path):
    from minigpt4.errors import DataError

    (tmp_path / "rows.json").write_text('[{"image": "none.png", "caption": "x"}]')
    tiny_values["datasets"]["validation"] = {"v": {"type": "conversations", "path": str(tmp_path / "rows.json")}}
    with pytest.raises(DataError, match="not one sample of v can be used"):
        train(tiny_values, tmp_path / "run")


@pytest.fixture
def batch(tiny_values, write_config) -> Batch:
    config = load_config(write_config(tiny_values))
    loaded = assemble(config)
    sources = {name: part.build(name=name) for name, part in config.datasets.train.items()}
    return next(fixed_batches(sources, loaded.conversation, loaded.image_processor, samples=8, batch_size=8, pad_id=0))


def test_shuffled_images_go_to_rows_that_say_something_else(batch):
    one_each = torch.arange(8) * batch.input_ids.shape[1]
    targets = torch.tensor([5, 6, 5, 6, 5, 6, 5, 6])  # every even rotation gives like to like
    shuffled = shuffle_images(dataclasses.replace(batch, supervised_positions=one_each, targets=targets))
    assert shuffled is not None
    shift = next(n for n in range(1, 8) if torch.equal(batch.pixel_values.roll(n, 0), shuffled.pixel_values))
    assert shift % 2 == 1
    assert torch.equal(shuffled.input_ids, batch.input_ids)


def test_there_is_no_control_without_two_different_rows(batch):
    one_each = torch.arange(8) * batch.input_ids.shape[1]
    same = dataclasses.replace(batch, supervised_positions=one_each, targets=torch.full_like(one_each, 5))
    assert shuffle_images(same) is None
    assert shuffle_images(dataclasses.replace(batch, pixel_values=None)) is None


def test_cached_features_are_shuffled_in_place_of_pixels(batch):
    features = torch.randn(8, 4, 3)
    shuffled = shuffle_images(dataclasses.replace(batch, pixel_values=None, query_features=features))
    assert shuffled is not None
    assert not torch.equal(shuffled.query_features, features)


def test_only_batches_that_could_be_shuffled_are_compared():
    assert not Validation(loss=5.0, own_loss=1.0, shuffled_loss=2.0).ignores_images
    assert Validation(loss=0.1, own_loss=2.0, shuffled_loss=2.01).ignores_images
    assert not Validation(1.0, math.nan, math.nan).ignores_images
