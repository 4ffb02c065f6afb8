"""Compiled layers give the losses of the layers as they are."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._inductor import config as inductor

from minigpt4.config import load_config
from minigpt4.datasets.collate import collate
from minigpt4.errors import ConfigError
from minigpt4.runners.compiling import compiled_layers, layers_of
from minigpt4.runners.run import check_run
from tests.models import parts
from tests.models.parts import CLOSE
from tests.runners.parts import assert_same_training, train, write

CPU = torch.device("cpu")


@pytest.mark.long
def test_a_compiled_run_is_the_run_itself(tiny_values, tmp_path, caplog):
    tiny_values["datasets"]["validation"] = tiny_values["datasets"]["train"]
    train(tiny_values, tmp_path / "plain", validate_every_steps=2)
    loaded = train(tiny_values, tmp_path / "compiled", compile=True, validate_every_steps=2)
    assert "nothing is compiled" not in caplog.text
    assert_same_training(tmp_path / "plain", tmp_path / "compiled")
    assert not any("forward" in vars(layer) for layer in layers_of(loaded.model.language_model))


@pytest.mark.long
def test_a_compiled_layer_has_the_loss_and_gradient_of_the_layer():
    model, batch, found = parts.model(), collate(parts.samples(), 0, few_widths=True), []
    for _ in range(2):
        model.zero_grad()
        loss = model(batch)
        loss.backward()
        found.append((loss.detach(), model.llama_proj.weight.grad.clone()))
        if len(found) == 1:
            with compiled_layers(model.language_model, CPU):
                assert all("forward" in vars(layer) for layer in layers_of(model.language_model))
                model.zero_grad()
                loss = model(batch)
                loss.backward()
                found.append((loss.detach(), model.llama_proj.weight.grad.clone()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **CLOSE)


@pytest.mark.parametrize("key", ["gradient_checkpointing", "shard_language_model"])
def test_what_cannot_be_combined_is_refused(key, tiny_values, tmp_path):
    config = load_config(write(tiny_values, tmp_path / "run", compile=True, **{key: True}))
    with pytest.raises(ConfigError, match=f"run.compile: cannot be combined with run.{key}"):
        check_run(config)


@pytest.mark.slow
def test_without_a_compiler_the_layers_run_as_they_are(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what was compiled before is not found
    monkeypatch.setattr(inductor.cpp, "cxx", (None, str(tmp_path / "absent")))  # as CXX says when torch is imported
    model, batch = parts.model(), collate(parts.samples(), 0)
    expected = model(batch)
    with caplog.at_level(logging.WARNING), compiled_layers(model.language_model, CPU):
        assert torch.equal(model(batch), expected)
    assert "nothing is compiled, and the run continues without" in caplog.text
    assert "needs a C++ compiler" in caplog.text
