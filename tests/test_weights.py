"""Reading weight files of every kind, and loading them strictly."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from minigpt4.errors import WeightsError
from minigpt4.weights import fingerprint, in_order, load_strict, read_tensors

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


class Trap:
    """Pickles to a call that leaves a mark on disk."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "1 missing: bias"),
        ({"head": torch.ones(1)}, "1 unexpected: head"),
        ({"bias": torch.ones(3)}, r"1 misfits: bias is \(3,\), should be \(2,\)"),
        (
            {"bias": None, "head": torch.ones(1)},
            r"1 missing: bias \(in the model, but not in the file.*\); 1 unexpected: head \(in the file, but",
        ),
        ({"bias": None, "proj.bias": torch.ones(2)}, r"1 renamed: proj\.bias \(for bias\) \(same shape under another"),
    ],
)
def test_loading_is_all_or_nothing(change, message):
    module = nn.Linear(3, 2)
    before = {k: t.clone() for k, t in module.state_dict().items()}
    tensors = {k: t for k, t in (TENSORS | change).items() if t is not None}
    with pytest.raises(WeightsError, match=r"weights do not fit Linear. file.pth: .*" + message):
        load_strict(module, tensors, source="file.pth")
    assert same(module.state_dict(), before)


def test_loading_reports_what_it_did():
    module = nn.Linear(3, 2)
    given = {"weight": TENSORS["weight"], **{f"old.{n}": torch.ones(1) for n in range(7)}}
    report = load_strict(
        module, given, source="f", ignore=lambda name: name.startswith("old."), optional=lambda name: name == "bias"
    )
    assert torch.equal(module.weight, TENSORS["weight"])
    assert re.fullmatch(
        r"f: 1 tensors loaded; 7 ignored: (old\.\d, ){4}old\.4 and 2 more \(known and not needed\)", str(report)
    )


def test_matching_by_order():
    renamed = in_order(nn.Linear(3, 2), {"a": TENSORS["weight"], "b": TENSORS["bias"]}, "f")
    assert same(renamed, TENSORS)
    with pytest.raises(WeightsError, match="f: has 1 tensors, Linear has 2"):
        in_order(nn.Linear(3, 2), {"a": TENSORS["weight"]}, "f")
    with pytest.raises(WeightsError, match=r"f: b is \(2,\), but weight at the same place is \(2, 3\)"):
        in_order(nn.Linear(3, 2), {"b": TENSORS["bias"], "a": TENSORS["weight"]}, "f")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_pickles_are_read(tmp_path, zipped, nested):
    content = {"model": TENSORS, "epoch": 3} if nested else TENSORS
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert same(read_tensors(tmp_path / "w.pth"), TENSORS)
    assert read_tensors(tmp_path / "w.pth", lambda name: name == "bias").keys() == {"bias"}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.6, 0.99])
def test_truncated_pickles(tmp_path, zipped, kept):
    file = tmp_path / "w.pth"
    torch.save({"weight": torch.rand(500)}, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(WeightsError, match=f"{file}: truncated or not a weight file"):
        read_tensors(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n<!DOCTYPE html><html></html>", "is a web page, not a weight file"),
        (b"<HTML><body>404</body></HTML>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git-lfs pointer.*git lfs pull"),
        (b"just some words", "truncated or not a weight file: torch cannot read its 15 bytes; download it again"),
        (b'{"error": "Repository not found"}', "truncated or not a weight file"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "truncated or not a weight file"),
        (b"", "it is empty"),
    ],
)
def test_files_without_weights(tmp_path, content, message):
    file = tmp_path / "w.pth"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_tensors(file)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_foreign_code_is_not_run(tmp_path, how):
    file, mark = tmp_path / "w.pth", tmp_path / "was_here"
    content = {"weight": torch.ones(2), "trap": Trap(mark)}
    if how == "pickle":
        file.write_bytes(pickle.dumps({"trap": Trap(mark)}, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    message = r"refused because it contains more than tensors and plain values: \S+ \(its code was not run\)"
    with pytest.raises(WeightsError, match=message) as refused:
        read_tensors(file)
    assert "weights_only" not in str(refused.value)  # torch's advice on how to run the code
    assert not mark.exists()


def test_a_web_page_saved_as_safetensors(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"<!DOCTYPE html><html></html>")
    with pytest.raises(WeightsError, match="safetensors: is a web page"):
        read_tensors(tmp_path / "w.safetensors")


def test_other_content_and_absent_files(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="contains a list, not a dictionary of tensors"):
        read_tensors(tmp_path / "list.pth")
    with pytest.raises(WeightsError, match=r"none.pth: no such weight file"):
        read_tensors(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        read_tensors(tmp_path)


def test_safetensors_alone_in_a_folder_and_in_shards(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert same(read_tensors(tmp_path / "model.safetensors"), TENSORS)
    assert same(read_tensors(tmp_path), TENSORS)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    places = {}
    for name, tensor in TENSORS.items():
        places[name] = f"model-{name}.safetensors"
        save_file({name: tensor}, sharded / places[name])
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert same(read_tensors(sharded), TENSORS)
    (sharded / places["weight"]).unlink()
    assert read_tensors(sharded, lambda name: name == "bias").keys() == {"bias"}  # other shards are not opened
    with pytest.raises(WeightsError, match="model-weight"):
        read_tensors(sharded)
    index.write_text('{"weight_map"')
    with pytest.raises(WeightsError, match=r"index.json: truncated or not an index"):
        read_tensors(sharded)


def test_truncated_safetensors(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="truncated or not a safetensors file"):
        read_tensors(file)


def test_fingerprint_does_not_depend_on_order_or_on_float32_and_bfloat16():
    named = [("a", torch.randn(100, 7)), ("b", torch.randn(3))]
    whole = fingerprint(named)
    assert fingerprint(reversed(named)) == whole
    assert fingerprint([(n, t.bfloat16()) for n, t in named]) == whole
    halves = [(n, t.half()) for n, t in named]  # published LLMs are stored in float16
    for dtype in (torch.float32, torch.bfloat16):
        assert fingerprint([(n, t.to(dtype)) for n, t in halves]) == fingerprint(halves)


def test_fingerprint_sees_a_changed_tensor_name_or_shape():
    named = {"a": torch.randn(1000, 7), "b": torch.randn(3)}
    whole = fingerprint(named.items())
    assert len(whole) == 16
    for other in (
        {**named, "a": named["a"] * 1.01},
        {**named, "a": named["a"].reshape(7, 1000)},
        {**named, "b": named["b"].flip(0)},
        {"a": named["a"], "c": named["b"]},
        {"a": named["a"]},
    ):
        assert fingerprint(other.items()) != whole
