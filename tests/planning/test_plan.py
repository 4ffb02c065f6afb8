"""What `plan` says without weights is what the real model has, does and takes; and what the paper reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from minigpt4.checkpoints.assemble import assemble
from minigpt4.cli import main
from minigpt4.config import config_from_values, load_config
from minigpt4.errors import ConfigError
from minigpt4.models.freezing import count_parameters
from minigpt4.planning.model import _LiveBytes, model_without_weights, parameter_bytes, step_bytes, step_flops
from minigpt4.planning.plan import make_plan
from minigpt4.planning.report import as_text
from minigpt4.runners.batches import build_sources, first_batches
from tests.runners.parts import write

LLAMA_13B: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}


@pytest.fixture(scope="module")
def llama_13b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the description of LLaMA-13B, and nothing else."""
    folder = tmp_path_factory.mktemp("llama") / "13b"
    LlamaConfig(**LLAMA_13B, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("resampler", ["merge", "qformer", "prefix"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_parameters_operations_and_bytes_are_those_of_the_real_model(tiny_values, resampler, attention):
    sizes: dict[str, dict[str, Any]] = {
        "merge": {"neighbours": 4},
        "qformer": {"weights": "random", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        "prefix": {"num_query_tokens": 4, "components": 8},
    }
    tiny_values["model"]["resampler"] = {"type": resampler, **sizes[resampler]}
    tiny_values["model"]["language_model"]["attn_implementation"] = attention
    loaded = assemble(config_from_values(tiny_values, "test"))
    real, meta = loaded.model.train(), model_without_weights(loaded.config.model)
    assert count_parameters(meta) == count_parameters(real)
    for part in ("vision_encoder", "resampler", "language_model", "llama_proj"):
        assert parameter_bytes(getattr(meta, part)) == parameter_bytes(getattr(real, part))
    sources = build_sources(loaded.config.datasets.train)
    (batch,) = first_batches(loaded.conversation, loaded.image_processor, sources, 4, 4)
    given = [tensor for tensor in vars(batch).values() if isinstance(tensor, torch.Tensor)]
    live = _LiveBytes([*real.parameters(), *real.buffers(), *given])
    with FlopCounterMode(display=False) as counter:
        real(batch).backward()
    real.zero_grad()
    with live:
        real(batch).backward()
    if attention == "eager":  # no count of the CPU's fused kernel
        assert step_flops(meta, batch) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert step_bytes(meta, batch) == pytest.approx(live.peak, rel=0.1)
    assert step_bytes(meta, batch) == step_bytes(meta, batch)  # nothing of one step is left for the next


def test_recomputed_activations_cost_operations_and_save_bytes(tiny_values):
    loaded = assemble(config_from_values(tiny_values, "test"))
    sources = build_sources(loaded.config.datasets.train)
    (batch,) = first_batches(loaded.conversation, loaded.image_processor, sources, 4, 4)
    meta = model_without_weights(loaded.config.model)
    assert step_flops(meta, batch, recompute=True) > 1.2 * step_flops(meta, batch)
    assert step_bytes(meta, batch, recompute=True) < 0.9 * step_bytes(meta, batch)


@pytest.mark.slow
def test_one_utilisation_gives_both_times_of_the_paper(llama_13b):
    """10 hours on four A100 (section 3.1), 400 steps in 7 minutes on one (section 3.3)."""
    options = [f"model.language_model.path={llama_13b}"]
    first = load_config("stage1_pretrain", options, paths_required=False)
    plan = make_plan(first, ["A100"], ranks=4)
    assert plan.devices[0].hours == pytest.approx(10, rel=0.3)
    assert plan.devices[0].fits
    assert plan.parameters["llama_proj"] == (3_937_280, 0)  # published
    assert (plan.steps, plan.samples) == (20_000, 5_120_000)
    second = load_config("stage2_finetune", [*options, "run.total_steps=400"], paths_required=False)
    assert make_plan(second, ["A100"]).devices[0].hours == pytest.approx(7 / 60, rel=0.3)


@pytest.mark.slow
def test_what_does_not_fit_is_named_with_what_to_change(llama_13b):
    options = [f"model.language_model.path={llama_13b}", "run.total_steps=400"]
    config = load_config("stage2_finetune", options, paths_required=False)
    default = make_plan(config, ["A100 40GB"]).peak_bytes
    config = load_config("stage2_finetune", [*options, "model.vision_encoder.dtype=float32"], paths_required=False)
    plan = make_plan(config, ["A100 40GB"])
    assert plan.peak_bytes - default == pytest.approx(1.84 * 2**30, rel=0.05)  # `auto` is bfloat16, whatever it is here
    assert [device.fits for device in plan.devices] == [False]
    saved = {change.option.partition("=")[0]: change.memory_gib for change in plan.changes}
    assert saved["run.gradient_checkpointing"] < 33
    needed = plan.peak_bytes / 2**30
    assert saved["model.vision_encoder.dtype"] == pytest.approx(needed - 1.84, abs=0.1)  # half of 985,897,344 x 4
    assert saved["datasets.feature_cache"] < needed - 3.8  # image encoder and Q-Former
    shown = as_text(plan)
    assert "DOES NOT FIT" in shown
    assert "run.gradient_checkpointing=true  -> fits A100 40GB" in shown


def test_the_command_reads_no_weights_and_names_what_is_missing(tiny_values, tmp_path, capsys):
    path = Path(tiny_values["model"]["language_model"]["path"])
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "llm").mkdir(exist_ok=True)
            (tmp_path / "llm" / file.name).write_bytes(file.read_bytes())
    tiny_values["model"]["language_model"]["path"] = str(tmp_path / "llm")
    tiny_values["model"]["vision_encoder"]["weights"] = "???"
    file = write(tiny_values, tmp_path / "job", global_batch_size=8)
    assert main(["plan", str(file), "--json", "--ranks", "2", "--device", "A100", "4090"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [device["name"] for device in plan["devices"]] == ["A100", "4090"]
    assert plan["samples"] == 4 * 8
    assert plan["epochs"] == pytest.approx(32 / 12)
    assert plan["cache_bytes"] == 12 * plan["cache_bytes_per_image"]
    assert "first 12 samples of the training data" in plan["rows"]
    assert main(["plan", str(file), "--ranks", "3"]) == 0
    assert "problem: run.global_batch_size 8 is not a multiple" in capsys.readouterr().out
    assert main(["plan", str(file), "--device", "A1000"]) == 1
    assert "unknown device 'A1000'; known: B200" in capsys.readouterr().err
    assert main(["plan", "stage1_pretrain"]) == 1
    assert "model.language_model.path: is required" in capsys.readouterr().err
    assert main(["plan", str(file), "--utilisation", "0"]) == 1
    assert "--utilisation above 0" in capsys.readouterr().err


def test_data_that_is_not_here_gives_the_longest_rows(tiny_values):
    tiny_values["datasets"]["train"]["pairs"]["path"] = ""
    config = config_from_values(tiny_values, "test")
    plan = make_plan(config, ["A100"])
    assert "the longest that the config allows" in plan.rows
    assert plan.cache_bytes is None
    assert plan.epochs is None


def test_a_cached_run_holds_no_image_encoder(tiny_values):
    direct = make_plan(config_from_values(tiny_values, "test"), ["A100"])
    tiny_values["datasets"]["feature_cache"] = "FOLDER"
    cached = make_plan(config_from_values(tiny_values, "test"), ["A100"])
    assert {"vision_encoder", "resampler"} & direct.memory.keys()
    assert not {"vision_encoder", "resampler"} & cached.memory.keys()
    assert cached.flops_per_step < direct.flops_per_step


def test_no_rank_is_not_a_device(tiny_values):
    with pytest.raises(ConfigError, match="unknown device"):
        make_plan(config_from_values(tiny_values, "test"), ["abacus"])
