"""Two gloo ranks give what one process gives, and fail together.

An indexed source hands reader r every second item of one sequence, so a step of two ranks with two samples each sees
the very samples that one process with four sees: the comparison is of the same data, summed in another order.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.datasets.source import permutation
from minigpt4.errors import CheckpointError
from tests.conftest import read_metrics
from tests.datasets.parts import image_bytes, write_shard
from tests.runners.parts import assert_same_training, losses, train, train_on_ranks, write

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_torchrun_with_two_ranks_gives_the_losses_of_one_process(tiny_values, tmp_path):
    train(tiny_values, tmp_path / "one", global_batch_size=4, batch_size_per_rank=4)
    file = write(tiny_values, tmp_path / "two", global_batch_size=4, batch_size_per_rank=2)
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "train.py"), "--cfg-path", str(file), "--options", "run.device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "one", tmp_path / "two")
    assert "2 per rank x 2 rank(s) x 1 accumulated" in (tmp_path / "two" / "log.txt").read_text()
    assert len(read_metrics(tmp_path / "two")) == 4  # rank 0 alone writes


def test_two_ranks_that_accumulate_are_one_large_batch(tiny_values, tmp_path):
    tiny_values["datasets"]["validation"] = tiny_values["datasets"]["train"]
    train(tiny_values, tmp_path / "one", global_batch_size=8, batch_size_per_rank=8)
    layout = {"group_by_length": 2, "pack": 150}  # of the same samples
    file = write(tiny_values, tmp_path / "two", global_batch_size=8, batch_size_per_rank=2, **layout)
    assert train_on_ranks([file, file]) == [0, 0]
    assert_same_training(tmp_path / "one", tmp_path / "two")
    validation = [read_metrics(tmp_path / name)[-1]["validation_loss"] for name in ("one", "two")]
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)


def text_for_second_reader(folder: Path, pairs: Path, rows: int, name: str) -> dict[str, Any]:
    """Return a data set of which reader 1 of 2 finds only texts in its first epoch, and reader 0 only images."""
    order = permutation(rows, 42, name, 0).tolist()
    content: list[dict[str, Any]] = [{} for _ in range(rows)]
    for place, row in enumerate(order):
        answer = {"from": "gpt", "value": f"number {row} " + "and more " * (row % 3)}
        if place % 2:
            content[row] = {"conversations": [{"from": "human", "value": f"which is {row}?"}, answer]}
        else:
            question = {"from": "human", "value": "<image>\nwhich?"}
            content[row] = {"image": f"{row % 12}.jpg", "conversations": [question, answer]}
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(content))
    return {"type": "conversations", "path": str(folder / "rows.json"), "image_dir": str(pairs / "image")}


@pytest.mark.parametrize(
    ("shard", "also"), [(False, ""), (True, ""), (False, "lora"), (True, "lora"), (False, "vision_encoder")]
)
def test_a_rank_with_text_alone_neither_hangs_nor_changes_the_numbers(shard, also, tiny_values, pairs, tmp_path):
    if also:
        tiny_values["model"]["trainable"] = ["llama_proj", also]
        tiny_values["model"]["language_model"]["lora"] = {"rank": 2 if also == "lora" else 0}
    tiny_values["datasets"] = {"train": {"talk": text_for_second_reader(tmp_path / "data", pairs, 16, "talk")}}
    train(tiny_values, tmp_path / "one", global_batch_size=4, batch_size_per_rank=4)
    file = write(tiny_values, tmp_path / "two", global_batch_size=4, batch_size_per_rank=2, shard_language_model=shard)
    assert train_on_ranks([file, file]) == [0, 0]
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_uneven_shards_do_not_hang_and_a_resume_goes_on(tiny_values, tmp_path):
    shards = []
    for number, size in enumerate((1, 7, 3)):
        samples = [
            {"__key__": f"{number}{n}", "jpg": image_bytes(n), "txt": f"image {n}".encode()} for n in range(size)
        ]
        shards.append(str(write_shard(tmp_path / f"{number}.tar", samples)))
    tiny_values["datasets"] = {"train": {"web": {"type": "web_pairs", "urls": shards}}}
    run = {"total_steps": 12, "batch_size_per_rank": 2, "save_every_steps": 5}
    # Resumed from step 5 as the very same run: every rank has its own positions.
    stopped = write(tiny_values, tmp_path / "parted", **{**run, "total_steps": 5, "min_learning_rate": 0.01})
    whole_rate = {**run, "min_learning_rate": 0.01}
    straight = write(tiny_values, tmp_path / "straight", **whole_rate)
    assert train_on_ranks([stopped, stopped]) == [0, 0]
    with pytest.raises(CheckpointError, match=r"was read by 2 rank\(s\) with 0 worker\(s\).*this run has 1 with 0"):
        train(tiny_values, tmp_path / "parted", **{**whole_rate, "resume": True, "batch_size_per_rank": 4})
    for end in (8, 12):  # twice: positions taken up from a checkpoint must not come back in the next one
        parted = write(tiny_values, tmp_path / "parted", **{**whole_rate, "total_steps": end, "resume": True})
        assert train_on_ranks([parted, parted]) == [0, 0]
    assert train_on_ranks([straight, straight]) == [0, 0]
    assert torch.isfinite(losses(tmp_path / "straight")).all()
    assert torch.equal(losses(tmp_path / "straight"), losses(tmp_path / "parted"))


def test_when_one_rank_fails_no_rank_says_it_succeeded(tiny_values, tmp_path):
    good = write(tiny_values, tmp_path / "run", total_steps=500)
    rows = tmp_path / "rows.json"
    rows.write_text('[{"image": "none.jpg", "caption": "gone"}]')
    tiny_values["datasets"] = {"train": {"bad": {"type": "conversations", "path": str(rows)}}}
    bad = write(tiny_values, tmp_path / "bad", total_steps=500)
    for file in (good, bad):
        text = file.read_text().replace("batch_size_per_rank: 4", "batch_size_per_rank: 2")
        file.write_text(text.replace("bad\n", "run\n") if file == bad else text)
    codes = train_on_ranks([good, bad], output=tmp_path / "errors")
    assert all(code not in (0, None) for code in codes), codes
    assert "error on rank 1: bad:" in (tmp_path / "errors1").read_text()


@pytest.mark.parametrize("lora", [False, True])
def test_a_language_model_spread_over_ranks_trains_like_a_whole_one(lora, tiny_values, tmp_path):
    tiny_values["datasets"]["validation"] = tiny_values["datasets"]["train"]
    if lora:
        tiny_values["model"]["trainable"] = ["llama_proj", "lora"]
        tiny_values["model"]["language_model"]["lora"] = {"rank": 2}
    # Three batches of validation for two ranks, the last without a control; accumulation; recomputed activations.
    run = {"min_learning_rate": 0.01, "validate_every_steps": 2, "gradient_checkpointing": True}
    whole = train(tiny_values, tmp_path / "one", **run, batch_size_per_rank=2, validation_samples=5)
    for part in ({"total_steps": 2}, {"resume": True}):
        split = {"batch_size_per_rank": 1, "validation_samples": 5, "shard_language_model": True}
        file = write(tiny_values, tmp_path / "two", **run, **split, **part)
        assert train_on_ranks([file, file]) == [0, 0]
    assert_same_training(tmp_path / "one", tmp_path / "two")
    one, two = (read_metrics(tmp_path / name)[-1] for name in ("one", "two"))
    for name in ("validation_loss", "validation_loss_shuffled_images"):
        assert one[name] == pytest.approx(two[name], rel=1e-5)
    log = (tmp_path / "two" / "log.txt").read_text()
    held, every = re.findall(r"2 ranks: this one holds ([\d,]+) of ([\d,]+)", log)[-1]
    layers = whole.model.language_model.model.get_decoder().layers
    frozen = sum(parameter.numel() for parameter in layers.parameters() if not parameter.requires_grad)
    assert int(every.replace(",", "")) - int(held.replace(",", "")) == frozen // 2


def test_adapters_of_an_earlier_stage_stay_whole(tiny_values, tmp_path):
    tiny_values["model"]["language_model"]["lora"] = {"rank": 2}
    tiny_values["model"]["trainable"] = ["llama_proj", "lora"]
    train(tiny_values, tmp_path / "first")
    tiny_values["model"] |= {
        "trainable": ["llama_proj"],
        "init_from": str(tmp_path / "first" / "checkpoints" / "latest"),
    }
    train(tiny_values, tmp_path / "one")
    file = write(tiny_values, tmp_path / "two", batch_size_per_rank=2, shard_language_model=True)
    assert train_on_ranks([file, file]) == [0, 0]
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_one_rank_alone_spreads_nothing_and_says_so(tiny_values, tmp_path, caplog):
    train(tiny_values, tmp_path / "plain")
    train(tiny_values, tmp_path / "spread", shard_language_model=True)
    assert "run.shard_language_model: there is only one rank, so nothing is sharded" in caplog.text
    assert_same_training(tmp_path / "plain", tmp_path / "spread", tolerance=0)
