"""The server that processes are forked from, and a second language model of the same size."""

from __future__ import annotations

import shutil
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.runners.parts import PROCESSES  # noqa: F401 (says what the server imports)

forkserver.ensure_running()  # before a data loader starts it with fewer imports: there is one for the whole session


@pytest.fixture(scope="session")
def other_llm(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a LLaMA of the same shape as the tiny one, with other weights."""
    folder = tmp_path_factory.mktemp("other") / "llm"
    shutil.copytree(tiny_llm, folder)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llm)).save_pretrained(folder)
    return folder
