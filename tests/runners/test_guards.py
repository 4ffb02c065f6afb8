"""What goes wrong in a run without ending it, and when it does end it: values that are not finite, skipped samples."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minigpt4.errors import DataError, TrainingError
from minigpt4.registry import PROCESSORS
from minigpt4.runners.state import Progress
from tests.conftest import read_metrics
from tests.runners.parts import train, weights

pytestmark = pytest.mark.slow


def noise_with(folder: Path, plain: list[int], rows: int = 8) -> dict[str, Any]:
    """Return a data set of noisy images, those numbered in `plain` of one colour: NaN once standardised."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(rows):
        noise = generator.integers(0, 255, (30, 30, 3), dtype=np.uint8)
        Image.fromarray(np.full_like(noise, 99) if number in plain else noise).save(folder / f"{number}.png")
    lines = [json.dumps({"image": f"{number}.png", "caption": f"picture {number}"}) for number in range(rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return {"type": "conversations", "path": str(folder / "rows.jsonl")}


@pytest.fixture
def standardised(tiny_values, monkeypatch) -> dict[str, Any]:
    monkeypatch.setattr(PROCESSORS, "_entries", dict(PROCESSORS._entries))
    monkeypatch.delitem(sys.modules, "tests.runners.standardise", raising=False)  # imported anew, it registers anew
    tiny_values["plugins"] = ["tests.runners.standardise"]
    tiny_values["processors"] = {"image": {"type": "standardise"}}
    tiny_values["run"] |= {"global_batch_size": 1, "batch_size_per_rank": 1}
    return tiny_values


def test_a_step_that_is_not_finite_is_left_out_counted_and_named(standardised, tmp_path):
    standardised["datasets"] = {"train": {"noise": noise_with(tmp_path / "data", plain=[3])}}
    train(standardised, tmp_path / "run", total_steps=16)
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["nonfinite_steps"] == 2  # once in each of two epochs
    left_out = [line["step"] for line in lines if line["loss"] is None]
    assert len(left_out) == 2
    assert all(line["grad_norm"] is None for line in lines if line["loss"] is None)
    log = (tmp_path / "run" / "log.txt").read_text()
    for step in left_out:
        assert f"step {step} skipped: loss nan, gradient norm nan; samples: rows.jsonl:4" in log
    assert all(math.isfinite(v) for tensor in weights(tmp_path / "run").values() for v in tensor.flatten().tolist())


def test_a_left_out_step_changes_no_weight(standardised, tmp_path):
    standardised["datasets"] = {"train": {"noise": noise_with(tmp_path / "data", plain=[3])}}
    train(standardised, tmp_path / "run", total_steps=8, save_every_steps=1, keep_last=9)
    bad = next(line["step"] for line in read_metrics(tmp_path / "run") if line["loss"] is None)
    assert bad > 1, "choose another plain image"
    before, after = (weights(tmp_path / "run", f"step_{step}") for step in (bad - 1, bad))
    assert all(before[name].equal(after[name]) for name in before)


def test_too_many_steps_in_a_row_end_the_run(standardised, tmp_path):
    standardised["datasets"] = {"train": {"noise": noise_with(tmp_path / "data", plain=list(range(8)))}}
    with pytest.raises(TrainingError, match=r"3 steps in a row .* up to step 3; the log names their samples"):
        train(standardised, tmp_path / "run", total_steps=20, max_nonfinite_steps=3)


def break_images(pairs: Path, folder: Path, every: int) -> Path:
    """Copy the pairs with each `every`-th image cut short."""
    folder.mkdir()
    (folder / "image").mkdir()
    rows = json.loads((pairs / "filter_cap.json").read_text())["annotations"][:10]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": rows}))
    for number in range(10):
        content = (pairs / "image" / f"{number}.jpg").read_bytes()
        (folder / "image" / f"{number}.jpg").write_bytes(content[:60] if number % every == 0 else content)
    return folder


def test_skipped_samples_are_counted_by_cause(tiny_values, pairs, tmp_path):
    tiny_values["datasets"]["train"]["pairs"]["path"] = str(break_images(pairs, tmp_path / "data", 10))
    train(tiny_values, tmp_path / "run", total_steps=9)
    last = read_metrics(tmp_path / "run")[-1]
    assert last["skipped/image"] == 4  # 36 samples used, 40 read
    assert (tmp_path / "run" / "log.txt").read_text().count("skipped (image):") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_more_skipped_samples_than_allowed_end_the_run(tiny_values, pairs, tmp_path, workers):
    tiny_values["datasets"]["train"]["pairs"]["path"] = str(break_images(pairs, tmp_path / "data", 5))
    with pytest.raises(TrainingError, match=r"\d+ of 2\d\d samples had to be skipped \(image: \d+\).*max_skipped_frac"):
        train(tiny_values, tmp_path / "run", total_steps=300, num_workers=workers, save_every_steps=1000)


def test_a_run_that_can_use_nothing_ends(tiny_values, pairs, tmp_path):
    tiny_values["datasets"]["train"]["pairs"]["path"] = str(break_images(pairs, tmp_path / "data", 1))
    with pytest.raises(DataError, match="samples in a row could not be used"):
        train(tiny_values, tmp_path / "run")


def test_a_few_samples_are_not_judged():
    progress = Progress(samples=100)
    progress.skipped.update({"image": 50})
    progress.check_skips(0.05)
    progress.samples = 160
    with pytest.raises(TrainingError, match="50 of 210"):
        progress.check_skips(0.05)
