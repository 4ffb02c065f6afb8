"""`benchmarks/gpu.py`: every row at the tiny size on the CPU, and the published way against ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.full_size import F32, TINY, Step, Way, hold, make_batch, make_model
from benchmarks.gpu import Bench, measure

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TRAINED = (
    *(f"stage1_{way}" for way in ("bf16", "bf16_autocast", "fp16_scaler", "bf16_eager", "cached_bf16")),
    *("stage2_bf16", "stage2_bf16_autocast", "stage1_checkpointing_bf16", "stage2_lora_bf16", "stage1_fsdp_bf16"),
    *("largest_bf16", "largest_cached_bf16", "largest_checkpointing_bf16", "13b_largest_bf16"),
)
PUBLISHED = ("stage1_published_fp16", "stage2_published_fp16", "largest_published_fp16", "13b_largest_published_fp16")
CHATS = ("chat_bf16", "chat_batch_bf16")


@pytest.mark.long
def test_every_row_is_measured_at_the_tiny_size(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--steps", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert out.read_text().splitlines() == lines
    found = [json.loads(line) for line in lines]
    assert [row for row in found if "error" in row] == []
    assert found[0]["name"] == "machine"
    assert found[0]["torch"] == torch.__version__
    rows = {row["name"]: row for row in found}
    for name in ("matmul", "copy", "build_7b", "build_13b", *PUBLISHED, *TRAINED, *CHATS):
        assert name in rows
        assert f"\n{name} " in done.stdout, "missing in the table"
    for name in (*PUBLISHED, *TRAINED):
        row = rows[name]
        assert row["samples_per_second"] == pytest.approx(row["batch"] / row["milliseconds"] * 1000, rel=0.01)
        assert min(row["flops"], row["mfu"], row["text_tokens_per_second"]) > 0
    for name in (*TRAINED, *CHATS):
        assert rows[name]["times_published"] > 0
    for name in CHATS:
        assert min(rows[name]["tokens_per_second"], rows[name]["first_token_milliseconds"]) > 0
    for name in ("stage1_parts_bf16", "stage1_parts_bf16_eager", "stage1_parts_bf16_autocast"):
        shares = {part: numbers["share"] for part, numbers in rows[name]["parts"].items()}
        assert list(shares) == ["vision_encoder", "qformer", "llm_forward", "llm_backward", "update"]
        assert sum(shares.values()) == pytest.approx(1, abs=0.001)
    assert rows["largest_bf16"]["flops"] == 2 * rows["stage1_bf16"]["flops"]  # of a batch twice as large
    assert rows["stage1_cached_bf16"]["flops"] < rows["stage1_bf16"]["flops"]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_published_way_is_the_same_computation(stage):
    torch.manual_seed(0)
    model = make_model(TINY, "7b", torch.device("cpu"))
    losses, gradients = [], []
    for way in (Way(F32, F32, F32), Way(F32, F32, F32, attention="eager", published=True)):
        hold(model, way)
        torch.manual_seed(1)  # the same images
        batch = make_batch(model, TINY, stage, rows=4, trim=not way.published)
        step = Step(model, way, batch)
        loss = step.module(batch) / step.tokens
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.llama_proj.weight.grad)
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


def test_a_row_that_fails_does_not_end_the_others(capsys):
    bench = Bench(torch.device("cpu"), TINY)
    bench.row("wrong", lambda bench: {"never": torch.zeros(2) @ torch.zeros(3)}, llm="")
    bench.row("right", lambda bench: {"value": 1}, llm="")
    wrong, right = map(json.loads, capsys.readouterr().out.splitlines())
    assert wrong["name"] == "wrong"
    assert wrong["error"].startswith("RuntimeError: ")
    assert right["value"] == 1


def test_no_row_starts_when_the_time_is_spent(capsys):
    measure(Bench(torch.device("cpu"), TINY, deadline=0))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) > 30
    assert all("not started" in row["error"] or "could not be built" in row["error"] for row in rows)


def test_only_chosen_rows_run(capsys):
    measure(Bench(torch.device("cpu"), TINY, steps=1, only=["stage2_bf16_auto"]))
    rows = [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()]
    assert rows == ["matmul", "copy", "build_7b", "stage2_bf16_autocast"]
