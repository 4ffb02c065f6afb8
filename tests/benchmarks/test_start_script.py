"""`benchmarks/start.py`: both starts at the tiny size, and how its summary compares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from benchmarks.start import main, summarise
from tests.conftest import COLOURS


def test_the_summary_counts_the_samples_to_the_loss_of_the_random_start_at_its_best_rate():
    curves = {
        ("random", 0.1): [[9.0, 8.0, 7.0, 6.0]],
        ("random", 0.2): [[9.0, 6.0, 4.0, 3.5], [9.0, 6.0, 4.0, 2.5]],
        ("ridge", 0.1): [[5.0, 3.5, 2.0, 1.0], [5.0, 3.5, 3.0, 3.0]],
    }
    found = summarise(curves, per_point=40, ridge=512)
    assert found["best_rate"] == {"random": 0.2, "ridge": 0.1}
    assert found["target_loss"] == 3.0
    assert (found["samples_random"], found["samples_ridge_steps"], found["ridge_samples"]) == (120, 80, 512)
    assert found["fewer_in_steps"] == 1.5
    never = summarise({("random", 0.1): [[9.0, 1.0]], ("ridge", 0.1): [[5.0, 4.0]]}, per_point=40, ridge=512)
    assert never["samples_ridge_steps"] is None


@pytest.mark.slow
def test_both_starts_are_measured(tiny_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "many"
    (folder / "image").mkdir(parents=True)
    rows = []
    for n in range(48):
        name, colour = list(COLOURS.items())[n % 4]
        Image.new("RGB", (30, 30), colour).save(folder / "image" / f"{n}.jpg")
        rows.append({"image_id": str(n), "caption": f"the image is {name}"})
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": rows}))
    tiny_values["datasets"]["train"]["pairs"]["path"] = str(folder)
    tiny_values["datasets"]["validation"] = tiny_values["datasets"]["train"]
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_values))
    sizes = {"pool": 48, "ridge": 48, "validation": 8, "batch": 4, "steps": 4, "every": 2, "seeds": 2}
    arguments = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    main(["--cfg-path", str(file), *arguments, "--random-rates", "1e-2", "--ridge-rates", "1e-2"])
    *lines, summary = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [(line["start"], line["seed"]) for line in lines] == [
        ("random", 0),
        ("random", 1),
        ("ridge", 0),
        ("ridge", 1),
    ]
    assert all(len(line["validation"]) == 3 for line in lines)
    assert lines[0]["validation"][0] != lines[1]["validation"][0]  # another random start
    assert lines[2]["validation"][0] == lines[3]["validation"][0]  # the same closed form
    assert summary["samples_random"] > 0
