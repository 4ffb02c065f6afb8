"""The configs of `configs/pairs`: what is missing is named at once; with weights, a pair fits what it promises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from minigpt4.checkpoints.assemble import assemble
from minigpt4.config import config_from_values, load_config, missing_files, shipped
from minigpt4.errors import ConfigError
from minigpt4.exports.fitting import MISFIT
from tests.conformance.tiny import write_llm
from tests.towers import write_tower

FOLDER = shipped("configs") / "pairs"
NAMES = sorted(file.stem.removesuffix("_stage1") for file in FOLDER.glob("*_stage1.yaml"))
TOWERS = {"siglip2_qwen3": "siglip", "clip_llama32": "whole clip", "siglip_smollm2": "siglip", "dinov3_qwen3": "dinov3"}
GIVEN = {1: "datasets.train.captions.urls=[x.tar]", 2: "datasets.train.conversations.path=x.jsonl"}


def config(name: str, stage: int) -> Any:
    return load_config(FOLDER / f"{name}_stage{stage}.yaml", [GIVEN[stage]])


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_everything_that_is_missing_is_named_at_once(name, stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = config(name, stage)
    with pytest.raises(ConfigError) as caught:
        assemble(found)
    named = [found.model.vision_encoder.config.path, found.model.language_model.config.path]
    named += [found.model.init_from] if stage == 2 else []
    assert all(path in str(caught.value) for path in named)
    assert len(missing_files(found, "model")) == len(named)


@pytest.mark.parametrize("name", NAMES)
def test_stage_2_continues_stage_1_with_the_same_parts(name):
    first, second = config(name, 1), config(name, 2)
    assert second.model.init_from == f"{first.run.output_dir}/checkpoints/latest"
    assert list(first.datasets.train) == ["captions"]
    assert list(second.datasets.train) == ["conversations"]
    for part in ("vision_encoder", "resampler", "projector", "language_model"):
        assert getattr(first.model, part) == getattr(second.model, part)


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_fits_the_formats_that_its_config_promises(name, tmp_path):
    values = config(name, 2).values
    values["model"]["init_from"] = ""
    tower = write_tower(TOWERS[name], tmp_path / "tower")
    values["model"]["vision_encoder"] |= {"path": str(tower), "dtype": "float32"}
    write_llm("qwen3", tmp_path / "llm")  # its chat template is ChatML, as that of SmolLM2 is
    values["model"]["language_model"] |= {"path": str(tmp_path / "llm"), "dtype": "float32"}
    if name == "siglip_smollm2":
        values["model"]["resampler"]["factor"] = 2  # the tiny tower has 4 x 4 patches
    loaded = assemble(config_from_values(values, name))
    text = (Path(FOLDER) / f"{name}_stage1.yaml").read_text()
    promised = set(re.findall(r"[\w-]+", re.search(r"Export: ([^(.]*)", text)[1]))
    fits = {to for to, misfit in MISFIT.items() if not misfit(loaded)} - {"prompt-embeds"}
    assert promised - {"prompt-embeds"} == fits
