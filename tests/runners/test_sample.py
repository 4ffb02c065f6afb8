"""The sample answer in the log: at the start and at each validation, and without an effect on the training."""

from __future__ import annotations

import re

import pytest

from minigpt4 import Chat, load_model
from minigpt4.config import load_config
from minigpt4.errors import ConfigError
from minigpt4.runners.train import TrainRunner
from tests.runners.parts import series, train, weights, write

pytestmark = pytest.mark.slow


def test_the_log_shows_the_answer_of_each_validation_and_training_is_the_same(tiny_values, pairs, tmp_path):
    tiny_values["datasets"]["validation"] = tiny_values["datasets"]["train"]
    image, question = str(pairs / "image/0.jpg"), "What is it?"
    run = train(tiny_values, tmp_path / "asked", sample_image=image, sample_question=question, validate_every_steps=2)
    lines = re.findall(
        r"step (\d) of 4, \d+ s: What is it\? -> (.*)", (tmp_path / "asked/log.txt").read_text(encoding="utf-8")
    )
    assert [int(step) for step, _ in lines] == [0, 2, 4]
    train(tiny_values, tmp_path / "plain", validate_every_steps=2)
    assert series(tmp_path / "asked") == series(tmp_path / "plain")
    one, other = weights(tmp_path / "asked"), weights(tmp_path / "plain")
    assert all(one[name].equal(other[name]) for name in one)
    assert run.model.training is False
    chat = Chat(load_model(tmp_path / "asked/checkpoints/latest", ["chat.max_new_tokens=32"], device="cpu"))
    last = " ".join(chat.session(images=[image]).ask(question).split()) or "(nothing)"
    assert lines[-1][1] == last


def test_a_sample_image_that_is_missing_ends_the_run_before_anything_is_loaded(tiny_values, tmp_path):
    file = write(tiny_values, tmp_path / "run", sample_image=str(tmp_path / "gone.png"))
    with pytest.raises(ConfigError, match=r"run\.sample_image: there is no file"):
        TrainRunner.from_config(load_config(file))
