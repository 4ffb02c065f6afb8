"""Reading weight files, and loading them strictly.

Input: a path (`.pth`, `.pt`, `.bin`, `.safetensors`, a sharded safetensors folder) and a module. Output: the module
with its weights, and a `LoadReport`. Nothing is skipped in silence: what is missing, unexpected or misshapen is an
error unless the caller has named it as expected. Used by models and by checkpoints.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
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

RANDOM = "random"
"""In place of a path: keep the random initial weights (tests and rehearsals; a model so built knows nothing)."""

_SHOWN = 5
_LARGE = 500_000_000
"""Bytes from which on loading shows a progress bar."""
_FOREIGN = re.compile(r"GLOBAL (\S+)")
"""Where torch's refusal of a pickle names what it would have to run."""
_MEANING = {
    "missing": "the model has them, the file has not: it is of another model, or incomplete",
    "renamed": "same shape under another name: the file was saved by other code",
    "unexpected": "the file has them, the model has no place for them",
    "misfits": "right name, wrong shape: the file is of another size of model",
    "ignored": "known and not needed",
}


@dataclass
class LoadReport:
    """What became of the tensors of one file: names by outcome.

    Attributes:
        source: the file.
        loaded: copied into the model.
        missing: wanted by the model and not in the file.
        renamed: pairs of a missing and an unexpected tensor that are one and the same, as far as can be told.
        unexpected: in the file, without a place in the model.
        misfits: in both, of different shapes.
        ignored: in the file, known, and left out on purpose.
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
    """Copy `tensors` into `module`, all or nothing.

    Args:
        module: its parameters and persistent buffers are the names wanted.
        tensors: by name, as `module.state_dict()` names them.
        source: where they come from, for messages.
        ignore: names in the file that are known and not wanted.
        optional: names in the module that the file may lack.
        empty_as: for a module built without memory, on the meta device: the precision of the tensors it is given.

    Raises:
        WeightsError: something is missing, unexpected or of another shape; the module is left untouched.
    """
    wanted = module.state_dict()
    report = LoadReport(source)
    for name, tensor in tensors.items():
        if name in wanted:
            if wanted[name].shape != tensor.shape:
                report.misfits.append(f"{name} is {tuple(tensor.shape)}, should be {tuple(wanted[name].shape)}")
            else:
                report.loaded.append(name)
        elif ignore(name):
            report.ignored.append(name)
        else:
            report.unexpected.append(name)
    report.missing = [name for name in wanted if name not in tensors and not optional(name)]
    if report.missing or report.unexpected or report.misfits:
        _pair_renamed(report, {name: t.shape for name, t in itertools.chain(wanted.items(), tensors.items())})
        raise WeightsError(f"weights do not fit {type(module).__name__}. {report}")
    given = {name: tensors[name] for name in report.loaded}
    if empty_as is None:
        module.load_state_dict(given, strict=False)
    else:
        _fill(module, given, empty_as, source)
    return report


def _fill(module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, source: str) -> None:
    """Give `module` copies of `tensors`, made one by one: what is mapped from disk is never twice in memory."""
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
            raise WeightsError(f"{source}: gives {type(module).__name__} no {name}, and it cannot do without")


def _pair_renamed(report: LoadReport, shapes: Mapping[str, torch.Size]) -> None:
    """Tell tensors that are only called otherwise from those that are missing or too many."""
    for theirs in list(report.unexpected):
        same = [ours for ours in report.missing if shapes[ours] == shapes[theirs]]
        near = difflib.get_close_matches(theirs, same, n=1, cutoff=0.5)
        if near:
            report.renamed.append(f"{theirs} (for {near[0]})")
            report.missing.remove(near[0])
            report.unexpected.remove(theirs)


def in_order(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename `tensors` to the names of `module`, matching both state dicts by order.

    For files whose names differ and whose order is the same; every shape must agree.

    Raises:
        WeightsError: the counts or a shape differ.
    """
    names = list(module.state_dict().items())
    if len(names) != len(tensors):
        raise WeightsError(f"{source}: holds {len(tensors)} tensors, {type(module).__name__} has {len(names)}")
    renamed = {}
    for (name, wanted), (theirs, tensor) in zip(names, tensors.items(), strict=True):
        if wanted.shape != tensor.shape:
            raise WeightsError(
                f"{source}: {theirs} is {tuple(tensor.shape)}, but {name} at its place is {tuple(wanted.shape)}"
            )
        renamed[name] = tensor
    return renamed


def read_tensors(path: str | Path, want: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Read the tensors of a weight file whose names `want` accepts, without running code from it.

    Pickles are opened by `torch.load(weights_only=True, mmap=True)`; a nested `model` dictionary, as the published
    files have, is opened too. Tensors stay on the CPU and, where the format allows, on disk until they are touched.

    Raises:
        WeightsError: no such file, not a weight file, truncated, or a pickle with foreign code in it.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, want)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weight file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, want)
    return {name: tensor for name, tensor in tensors_of(read_pickle(path), path).items() if want(name)}


def tensors_of(content: object, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle's content, by name; those under `model` if it is nested.

    Raises:
        WeightsError: it is no dictionary of tensors.
    """
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def read_pickle(path: Path) -> object:
    """Return the content of a pickle of tensors and plain values, its tensors mapped from disk; see `read_tensors`."""
    _check_start(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # files from before torch 1.6 are no zip archives
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        foreign = _FOREIGN.search(str(error))
        if isinstance(error, pickle.UnpicklingError) and foreign:
            raise WeightsError(
                f"{path}: refused, it holds more than tensors and plain values: {foreign[1]}, whose code was not run; "
                "ask for a file of tensors alone, or as .safetensors"
            ) from error
        reason = f"{path.stat().st_size:,} bytes that torch cannot read"
        raise WeightsError(f"{path}: truncated or not a weight file: {reason}; get it again") from error


def _check_start(path: Path) -> None:
    """Raise WeightsError for what by its first bytes is something else than weights."""
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if not head:
        raise WeightsError(f"{path}: truncated or not a weight file: it is empty; get it again")
    if head.startswith((b"<!doctype", b"<html")):
        raise WeightsError(f"{path}: is a web page, not a weight file; download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path}: is a git-lfs pointer, not the weights; fetch it with `git lfs pull`")


def _read_safetensors(path: Path, want: Callable[[str], bool]) -> dict[str, Tensor]:
    if path.is_file():
        _check_start(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if want(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: truncated or not a safetensors file: {error}") from error


def _read_folder(folder: Path, want: Callable[[str], bool]) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index}: truncated or not an index of weights: {error!r}") from error
        files = sorted({file for name, file in places if want(name)})
    elif (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        raise WeightsError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_safetensors(folder / file, want)
    return tensors


def fingerprint(tensors: Iterable[tuple[str, Tensor]], samples: int = 64) -> str:
    """Return a short identity of named tensors: names, shapes and `samples` values of each, spread evenly.

    Values are rounded to bfloat16 first, so that a model loaded in float32 or bfloat16 keeps its identity; float16
    rounds a float32 file differently and gives another one. Reading a few values of each tensor takes a fraction of a
    second on 7 billion parameters; a changed tensor is practically always seen, a single changed value is not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        gathered = getattr(tensor, "full_tensor", None)  # of a tensor that is spread over ranks
        flat = (gathered() if gathered else tensor).detach().reshape(-1)
        count = min(samples, flat.numel())
        places = torch.linspace(0, max(flat.numel() - 1, 0), count, dtype=torch.float64).long().to(flat.device)
        values = flat[places].to(device="cpu", dtype=torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.float().numpy().tobytes())
    return digest.hexdigest()[:16]
