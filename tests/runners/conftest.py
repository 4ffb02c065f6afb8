"""A second language model of the same size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def other_llm(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a LLaMA of the same shape as the tiny one, with other weights."""
    folder = tmp_path_factory.mktemp("other") / "llm"
    shutil.copytree(tiny_llm, folder)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llm)).save_pretrained(folder)
    return folder
