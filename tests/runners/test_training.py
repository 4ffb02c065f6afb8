"""One run in one process: its folder, its loss, what it changes, and that batches divide as one likes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaTokenizer

from minigpt4.checkpoints.manifest import Manifest
from minigpt4.config import load_config
from minigpt4.errors import ConfigError, TrainingError
from minigpt4.models.recompute import recompute_activations
from minigpt4.runners.distributed import build_accelerator
from minigpt4.runners.run import build_run, parameter_groups
from minigpt4.runners.train import train as train_run
from tests import REFERENCE
from tests.conftest import read_metrics
from tests.runners.parts import assert_same_training, losses, series, train, weights, write

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_train_py_leaves_a_complete_run_folder(tiny_values, tmp_path):
    """And needs no wandb: timm imports it where it finds it, so the test is that the run goes without."""
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "wandb.py").write_text("raise ImportError('absent')")
    file = write(tiny_values, tmp_path / "run")
    command = [sys.executable, str(ROOT / "train.py"), "--cfg-path", str(file), "--options", "run.seed=7"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "absent")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=90)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    saved = load_config(folder / "config.yaml")
    assert saved == load_config(file, ["run.seed=7"])
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"step", "loss", "lr", "samples", "tokens", "seconds", "grad_norm"} <= lines[0].keys()
    assert [line["samples"] for line in lines] == [4, 8, 12, 16]
    assert all(a["tokens"] < b["tokens"] for a, b in itertools.pairwise(lines))
    log = (folder / "log.txt").read_text()
    assert "llama_proj                2,080                0  float32" in log
    assert "language_model                0" in log
    assert "global batch 4 = 4 per rank x 1 rank(s) x 1 accumulated; 4 steps; no autocast" in log
    assert str(folder) in log
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["latest", "step_2", "step_4"]
    assert (folder / "checkpoints" / "latest").resolve().name == "step_4"
    files = {"config.yaml", "manifest.json", "model.safetensors", "training_state.pt"}
    assert {p.name for p in (folder / "checkpoints" / "latest").iterdir()} == files


def test_the_loss_falls_and_only_llama_proj_changes(tiny_values, tmp_path):
    one = train(tiny_values, tmp_path / "one", total_steps=1, save_every_steps=0).model
    many = train(tiny_values, tmp_path / "many", total_steps=60, save_every_steps=0).model
    falling = losses(tmp_path / "many")
    assert falling[-10:].mean() < falling[:3].mean() - 0.4  # nats
    before, after = one.state_dict(), many.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"llama_proj.weight", "llama_proj.bias"} == set(weights(tmp_path / "many"))


def test_one_step_changes_llama_proj_and_nothing_else(tiny_values, tmp_path):
    from minigpt4.checkpoints.assemble import assemble

    fresh = assemble(load_config(write(tiny_values, tmp_path / "one"))).model.state_dict()
    after = train(tiny_values, tmp_path / "one", total_steps=1).model.state_dict()
    changed = {name for name in after if not torch.equal(fresh[name], after[name])}
    assert changed == {"llama_proj.weight", "llama_proj.bias"}


def test_accumulation_over_k_is_one_k_fold_batch(tiny_values, tmp_path):
    """Captions differ in length, so a mean of means would show."""
    train(tiny_values, tmp_path / "whole", global_batch_size=6, batch_size_per_rank=6)
    for each in (1, 2, 3):
        train(tiny_values, tmp_path / f"by_{each}", global_batch_size=6, batch_size_per_rank=each)
        assert_same_training(tmp_path / "whole", tmp_path / f"by_{each}")


def test_the_same_config_gives_the_same_run(tiny_values, tmp_path):
    train(tiny_values, tmp_path / "one")
    train(tiny_values, tmp_path / "again")
    assert series(tmp_path / "one") == series(tmp_path / "again")


def test_a_mean_is_logged_over_the_steps_between_two_lines(tiny_values, tmp_path):
    train(tiny_values, tmp_path / "each", total_steps=7)
    train(tiny_values, tmp_path / "some", total_steps=7, log_every_steps=3)
    assert [line["step"] for line in read_metrics(tmp_path / "some")] == [1, 3, 6, 7]
    every, some = read_metrics(tmp_path / "each"), read_metrics(tmp_path / "some")
    tokens = [b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *every], every, strict=False)]
    mean = sum(every[n]["loss"] * tokens[n] for n in (3, 4, 5)) / sum(tokens[3:6])
    assert some[2]["loss"] == pytest.approx(mean, rel=1e-6)


def test_clipping_bounds_the_step_and_zero_turns_it_off(tiny_values, tmp_path):
    """Adam forgives a scale; the first gradient is seen in its first moment instead."""
    norms = {}
    for limit in (1e-3, 0.0):
        folder = tmp_path / str(limit)
        train(tiny_values, folder, total_steps=1, max_grad_norm=limit, adam_betas=[0.9, 0.999])
        state = torch.load(folder / "checkpoints/latest/training_state.pt", weights_only=True)["optimizer"]["state"]
        norms[limit] = torch.stack([moments["exp_avg"].norm() for moments in state.values()]).norm().item() / 0.1
        logged = read_metrics(folder)[0]["grad_norm"]
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert norms[0.0] == pytest.approx(logged, rel=1e-4)  # the norm before clipping is what is logged


def test_matrices_decay_and_vectors_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decaying, others = parameter_groups(model, 0.05)
    assert [tuple(p.shape) for p in decaying["params"]] == [(4, 3)]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    assert len(others["params"]) == 3


def test_the_log_says_in_which_precision_each_part_is_held(tiny_values, tmp_path):
    tiny_values["model"]["language_model"]["dtype"] = "bfloat16"
    train(tiny_values, tmp_path / "run", precision="bf16", total_steps=1)
    log = (tmp_path / "run" / "log.txt").read_text()
    held = {line.split()[0]: line.split()[-1] for line in log.splitlines() if len(line.split()) == 4}
    assert held["vision_encoder"] == held["llama_proj"] == "float32"
    assert held["language_model"] == "bfloat16"
    assert "autocast to bf16" in log


def test_the_manifest_notes_no_data_that_only_evaluation_reads(tiny_values, tmp_path):
    train({**tiny_values, "evaluation": {"path": "asset:easy-vqa"}}, tmp_path / "run", total_steps=1)
    assert Manifest.read(tmp_path / "run" / "checkpoints" / "latest").notes == []


def test_the_seconds_of_the_first_step_are_without_the_loading_before_it(tiny_values, tmp_path):
    config = load_config(write(tiny_values, tmp_path / "run", total_steps=1))
    (tmp_path / "run").mkdir()
    run = build_run(config, build_accelerator(config.run, [], tmp_path / "run"), None)
    run.state.speed.started -= 1000  # as if building the parts had taken so long
    train_run(run)
    assert 0 < read_metrics(tmp_path / "run")[0]["seconds"] < 1000


def test_bf16_trains_on_a_cpu_in_the_same_process_after_fp32(tiny_values, tmp_path):
    train(tiny_values, tmp_path / "fp32", precision="fp32")
    model = train(tiny_values, tmp_path / "bf16", precision="bf16").model
    assert "bf16" in (tmp_path / "bf16" / "log.txt").read_text()
    assert model.llama_proj.weight.dtype == torch.float32
    assert not torch.equal(losses(tmp_path / "fp32"), losses(tmp_path / "bf16"))
    torch.testing.assert_close(losses(tmp_path / "fp32"), losses(tmp_path / "bf16"), rtol=0.05, atol=0.05)


def test_fp16_without_an_accelerator_is_refused(tiny_values, tmp_path):
    with pytest.raises(ConfigError, match="fp16 needs an accelerator"):
        train(tiny_values, tmp_path / "run", precision="fp16")


def test_gradient_checkpointing_recomputes_frozen_layers_and_changes_no_number(tiny_values, tmp_path):
    model = train(tiny_values, tmp_path / "plain").model
    train(tiny_values, tmp_path / "saving", gradient_checkpointing=True)
    assert_same_training(tmp_path / "plain", tmp_path / "saving", tolerance=1e-6)

    calls = []
    language_model = model.language_model.model
    layer = language_model.model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    recompute_activations(language_model)
    embeds = torch.randn(1, 5, 32, requires_grad=True)
    language_model(inputs_embeds=embeds, use_cache=False).logits.sum().backward()
    assert len(calls) == 2
    assert not layer.self_attn.training


def test_a_batch_without_images_trains(tiny_values, tmp_path):
    rows = tmp_path / "rows.jsonl"
    talk = '{"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]}\n'
    rows.write_text(talk * 4)
    tiny_values["datasets"] = {"train": {"talk": {"type": "conversations", "path": str(rows), "images": "optional"}}}
    with pytest.raises(TrainingError, match=r"step 4: 16 samples had not one image, and the gradient was exactly zero"):
        train(tiny_values, tmp_path / "run")
    tiny_values["model"]["trainable"] = ["llama_proj", "lora"]
    tiny_values["model"]["language_model"]["lora"] = {"rank": 2}
    train(tiny_values, tmp_path / "lora")
    assert all(line["grad_norm"] > 0 for line in read_metrics(tmp_path / "lora"))


def test_nothing_to_train_is_said(tiny_values, tmp_path):
    tiny_values["model"]["trainable"] = []
    with pytest.raises(ConfigError, match=r"model\.trainable"):
        train(tiny_values, tmp_path / "run")


def test_a_language_model_that_trains_cannot_be_spread_over_ranks(tiny_values, tmp_path):
    tiny_values["model"]["trainable"] = ["language_model"]
    with pytest.raises(ConfigError, match=r"run\.shard_language_model: shards a frozen language model"):
        train(tiny_values, tmp_path / "run", shard_language_model=True)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"total_steps": 0}, "run.total_steps: must be at least 1"),
        ({"batch_size_per_rank": 0}, "batch_size_per_rank must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"keep_last": 0}, "keep_last must be at least 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_loading(tiny_values, tmp_path, run, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny_values, tmp_path / "run", **run)
    assert not (tmp_path / "run").exists()


def test_a_global_batch_that_does_not_divide_is_refused(tiny_values, tmp_path):
    with pytest.raises(TrainingError, match=r"global_batch_size 5 is not a multiple of run\.batch_size_per_rank 2"):
        train(tiny_values, tmp_path / "run", global_batch_size=5, batch_size_per_rank=2)


@pytest.mark.parametrize("layout", [{"group_by_length": 2}, {"pack": 300}, {"group_by_length": 2, "pack": 130}])
def test_grouped_and_packed_rows_give_the_losses_of_padded_ones(tiny_values, tmp_path, layout):
    run = {"global_batch_size": 4, "batch_size_per_rank": 2, "total_steps": 3}
    train(tiny_values, tmp_path / "padded", **run)
    train(tiny_values, tmp_path / "other", **run, **layout)
    assert_same_training(tmp_path / "padded", tmp_path / "other")


def test_packing_is_refused_for_a_model_that_cannot_keep_samples_apart(tiny_values, tmp_path):
    tiny_values["model"]["language_model"]["path"] = str(tmp_path / "bloom")
    bloom = BloomConfig(vocab_size=700, hidden_size=32, n_layer=1, n_head=2)
    for part in (BloomForCausalLM(bloom), LlamaTokenizer.from_pretrained(REFERENCE, local_files_only=True)):
        part.save_pretrained(tmp_path / "bloom")
    with pytest.raises(ConfigError, match=r"bloom does not accept position_ids.*run.pack to 0"):
        train(tiny_values, tmp_path / "run", pack=200)
