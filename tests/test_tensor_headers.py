"""Headers read without torch are those of the tensors; what is not regular is left to torch."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minigpt4.tensor_headers import content_of_pickle, headers_of, headers_of_safetensors

NAMES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES = [getattr(torch, name) for name in NAMES]


def tensors() -> dict[str, torch.Tensor]:
    return {f"{n}.weight": torch.ones(n, 2, dtype=dtype) for n, dtype in enumerate(DTYPES)}


def expected(given: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in given.items()}


def found(headers: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (header.shape, header.dtype) for name, header in headers.items()}


def test_safetensors(tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors", {"format": "pt"})
    assert found(headers_of_safetensors(tmp_path / "a.safetensors")) == expected(tensors())
    content = (tmp_path / "a.safetensors").read_bytes()
    for damaged in (content[:-1], content[:40], b"", content + b"0", b"\xff" * 16):
        (tmp_path / "b.safetensors").write_bytes(damaged)
        assert headers_of_safetensors(tmp_path / "b.safetensors") is None


@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda t: {"model": t, "epoch": 3, "config": {"a": [1, "x"]}}])
def test_pickles(tmp_path, wrap):
    given = {**tensors(), "p": torch.nn.Parameter(torch.ones(3)), "view": torch.ones(4, 6)[1:3, ::2]}
    torch.save(wrap(given), tmp_path / "a.pth")
    content = content_of_pickle(tmp_path / "a.pth")
    assert found(headers_of(content)) == expected(given)
    assert content.get("epoch", 3) == 3


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


def test_foreign_code_and_damage_are_left_to_torch_and_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.ones(2)}, "evil": _Evil()}, "evil.pth")
    assert content_of_pickle(Path("evil.pth")) is None
    assert not Path("evil").exists()
    torch.save(tensors(), "whole.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:-200])
    Path("old.pth").write_bytes(pickle.dumps({"a": 1}))
    assert [content_of_pickle(Path(name)) for name in ("cut.pth", "old.pth", "gone.pth")] == [None] * 3
