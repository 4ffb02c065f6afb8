"""Reading weight files, and loading them strictly.

Input: a path (`.pth`, `.pt`, `.bin`, `.safetensors`, a sharded safetensors folder) and a module. Output: the module
with its weights, and a `LoadReport`. Tensors that are missing, unexpected or of another shape are an error unless the
caller allows them by name.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from minigpt4.errors import WeightsError
from minigpt4.strict_json import parse_json

RANDOM = "random"
"""In place of a path: keep the random initial weights, for tests and rehearsals."""

_SHOWN = 5
_LARGE = 500_000_000
"""Bytes above which loading shows a progress bar."""
_FOREIGN = re.compile(r"GLOBAL (\S+)")
"""Matches the name of the code in torch's message about a pickle that it refuses."""
_MEANING = {
    "missing": "in the model, but not in the file: the file belongs to another model or is incomplete",
    "renamed": "same shape under another name: the file was saved by different code",
    "unexpected": "in the file, but not in the model",
    "misfits": "same name, different shape: the file belongs to a model of another size",
    "ignored": "known and not needed",
}


@dataclass
class LoadReport:
    """The tensors of one file and of the model, by what was done with them.

    Attributes:
        source: the file.
        loaded: copied into the model.
        missing: in the model, but not in the file.
        renamed: pairs of an unexpected and a missing tensor that are probably the same one.
        unexpected: in the file, but not in the model.
        misfits: in both, with different shapes.
        ignored: in the file, known, and not needed.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for name, meaning in _MEANING.items():
            found = getattr(self, name)
            if found:
                more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
                parts.append(f"{len(found)} {name}: {', '.join(found[:_SHOWN])}{more} ({meaning})")
        return f"{self.source}: " + "; ".join(parts)


def load_strict(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    ignore: Callable[[str], bool] = lambda name: False,
    optional: Callable[[str], bool] = lambda name: False,
    empty_as: torch.dtype | None = None,
) -> LoadReport:
    """Copy `tensors` into `module`, either all of them or none.

    Args:
        module: every parameter and persistent buffer of it is required.
        tensors: by name, as in `module.state_dict()`.
        source: where they come from, for messages.
        ignore: whether a name that is only in `tensors` is known and not needed.
        optional: whether a name that is only in `module` may be missing.
        empty_as: the precision of the tensors for a module that was built on the meta device, without memory.

    Raises:
        WeightsError: a tensor is missing, unexpected or of another shape; the module is unchanged.
    """
    expected = module.state_dict()
    report = LoadReport(source)
    for name, tensor in tensors.items():
        if name in expected:
            if expected[name].shape != tensor.shape:
                report.misfits.append(f"{name} is {tuple(tensor.shape)}, should be {tuple(expected[name].shape)}")
            else:
                report.loaded.append(name)
        elif ignore(name):
            report.ignored.append(name)
        else:
            report.unexpected.append(name)
    report.missing = [name for name in expected if name not in tensors and not optional(name)]
    if report.missing or report.unexpected or report.misfits:
        _pair_renamed(report, {name: t.shape for name, t in itertools.chain(expected.items(), tensors.items())})
        raise WeightsError(f"weights do not fit {type(module).__name__}. {report}")
    given = {name: tensors[name] for name in report.loaded}
    if empty_as is None:
        module.load_state_dict(given, strict=False)
    else:
        _fill(module, given, empty_as, source)
    return report


def _fill(module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, source: str) -> None:
    """Assign copies of `tensors` to `module`, one by one, so that a file mapped from disk is never in memory twice."""
    size = sum(t.numel() * dtype.itemsize for t in tensors.values())
    quiet = size < _LARGE or os.environ.get("RANK", "0") != "0"
    own = {}
    with tqdm(total=size, desc=Path(source).name, unit="B", unit_scale=True, disable=quiet) as bar:
        for name in list(tensors):
            tensor = tensors.pop(name)
            own[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            bar.update(own[name].nbytes)
    module.load_state_dict(own, strict=False, assign=True)
    for name, held in itertools.chain(module.named_parameters(), module.named_buffers()):
        if held.is_meta:
            raise WeightsError(f"{source}: {name} is missing and {type(module).__name__} requires it")


def _pair_renamed(report: LoadReport, shapes: Mapping[str, torch.Size]) -> None:
    """Move tensors that only have another name from the missing and unexpected ones to the renamed ones."""
    for theirs in list(report.unexpected):
        same = [ours for ours in report.missing if shapes[ours] == shapes[theirs]]
        near = difflib.get_close_matches(theirs, same, n=1, cutoff=0.5)
        if near:
            report.renamed.append(f"{theirs} (for {near[0]})")
            report.missing.remove(near[0])
            report.unexpected.remove(theirs)


def in_order(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename `tensors` to the names of `module`, matching both by their order.

    For files with other names in the same order; every shape must be equal.

    Raises:
        WeightsError: the counts or a shape differ.
    """
    names = list(module.state_dict().items())
    if len(names) != len(tensors):
        raise WeightsError(f"{source}: has {len(tensors)} tensors, {type(module).__name__} has {len(names)}")
    renamed = {}
    for (name, expected), (theirs, tensor) in zip(names, tensors.items(), strict=True):
        if expected.shape != tensor.shape:
            raise WeightsError(
                f"{source}: {theirs} is {tuple(tensor.shape)}, but {name} at the same place is {tuple(expected.shape)}"
            )
        renamed[name] = tensor
    return renamed


def read_tensors(path: str | Path, select: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Read the tensors of a weight file whose names `select` accepts, without running code from the file.

    Pickles are read by `torch.load(weights_only=True, mmap=True)`, also from a nested dictionary `model` as in the
    published files. Tensors stay on the CPU and, if the format supports it, on disk until they are used.

    Raises:
        WeightsError: no such file, not a weight file, truncated, or a pickle with foreign code.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, select)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weight file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, select)
    return {name: tensor for name, tensor in tensors_of(read_pickle(path), path).items() if select(name)}


def tensors_of(content: object, path: Path) -> dict[str, Tensor]:
    """Return the tensors in the content of a pickle, by name; those under `model` if it is nested.

    Raises:
        WeightsError: the content is not a dictionary of tensors.
    """
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: contains a {type(content).__name__}, not a dictionary of tensors")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def read_pickle(path: Path) -> object:
    """Return the content of a pickle of tensors and plain values; see `read_tensors`."""
    _check_start(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # files of torch before 1.6 are not zip archives
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise errors of any kind
        foreign = _FOREIGN.search(str(error))
        if isinstance(error, pickle.UnpicklingError) and foreign:
            raise WeightsError(
                f"{path}: refused because it contains more than tensors and plain values: {foreign[1]} (its code was "
                "not run). Use a file that contains only tensors, or a .safetensors file"
            ) from error
        size = f"{path.stat().st_size:,} bytes"
        raise WeightsError(
            f"{path}: truncated or not a weight file: torch cannot read its {size}; download it again"
        ) from error


def _check_start(path: Path) -> None:
    """Raise WeightsError if the first bytes show that the file is not a weight file."""
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if not head:
        raise WeightsError(f"{path}: truncated or not a weight file: it is empty; download it again")
    if head.startswith((b"<!doctype", b"<html")):
        raise WeightsError(f"{path}: is a web page, not a weight file; download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path}: is a git-lfs pointer, not the weights; fetch it with `git lfs pull`")


def _read_safetensors(path: Path, select: Callable[[str], bool]) -> dict[str, Tensor]:
    if path.is_file():
        _check_start(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if select(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: truncated or not a safetensors file: {error}") from error


def _read_folder(folder: Path, select: Callable[[str], bool]) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({file for name, file in read_index(index).items() if select(name)})
    elif (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        raise WeightsError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_safetensors(folder / file, select)
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """Return the shard of each tensor, by name, from the index of a sharded model.

    Raises:
        WeightsError: it is truncated or not an index.
    """
    try:
        return dict(parse_json(index.read_bytes())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index}: truncated or not an index of weights: {error!r}") from error


def fingerprint(tensors: Iterable[tuple[str, Tensor]], samples: int = 64) -> str:
    """Return a short hash of named tensors: their names, shapes and `samples` evenly spaced values of each.

    Values are rounded to bfloat16 first, so that a model has the same hash in float32 and in bfloat16; float16 rounds a
    float32 file differently and gives another hash. This takes a fraction of a second for 7 billion parameters. A
    changed tensor almost always changes the hash, a single changed value does not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        gathered = getattr(tensor, "full_tensor", None)  # a tensor that is sharded over ranks
        flat = (gathered() if gathered else tensor).detach().reshape(-1)
        count = min(samples, flat.numel())
        places = torch.linspace(0, max(flat.numel() - 1, 0), count, dtype=torch.float64).long().to(flat.device)
        values = flat[places].to(device="cpu", dtype=torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.float().numpy().tobytes())
    return digest.hexdigest()[:16]
