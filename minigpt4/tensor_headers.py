"""Names, shapes and precisions of the tensors in weight files, read without torch: importing it takes seconds.

Input: a file. Output: the same as `minigpt4.weights` returns, with a `Header` in place of each tensor; None if the file
is not as regular as torch and safetensors write it. Then `minigpt4.weights` reads it, and says what is wrong. No code
in a pickle is run: it may only name what a file of tensors and plain values needs, and each name has a stand-in here.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.strict_json import parse_json

MAX_HEADER = 100_000_000
"""Most bytes of the header of a safetensors file, the limit of the library."""
_NAMES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""torch's names of the precisions in safetensors files, and their bytes."""
_STORAGES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
"""Precision and bytes of a value, by the class of a storage."""


@dataclass(frozen=True)
class Header:
    """What is known of a tensor without its values.

    Attributes:
        shape: its sizes.
        dtype: its precision, as torch names it.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of values."""
        return math.prod(self.shape)


def headers_of_safetensors(path: Path, select: Callable[[str], bool] = lambda name: True) -> dict[str, Header] | None:
    """Return the headers of a safetensors file, by name."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                return None
            described = parse_json(file.read(length))
        described.pop("__metadata__", None)
        found, end = {}, 0
        for name, tensor in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
            header = Header(tuple(tensor["shape"]), _NAMES[tensor["dtype"]][0])
            first, last = tensor["data_offsets"]
            if first != end or last - first != header.numel() * _NAMES[tensor["dtype"]][1]:
                return None
            found[name], end = header, last
        if path.stat().st_size != 8 + length + end:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return {name: header for name, header in found.items() if select(name)}


def content_of_pickle(path: Path) -> Any:
    """Return the content of a file that `torch.save` wrote, with headers in place of tensors; None if it is irregular.

    The storages of all tensors must be in the file, as long as they should be.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            (name,) = (each for each in sizes if each.endswith("/data.pkl") and each.count("/") == 1)
            with archive.open(name) as content:
                return _Headers(content, name.removesuffix("data.pkl") + "data/", sizes).load()
    except Exception:  # what a damaged file raises depends on the byte; torch then says what is wrong
        return None


def headers_of(content: Any) -> dict[str, Header] | None:
    """Return the headers in the content of a pickle, by name: those under `model` if it is nested, as in `weights`."""
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        return None
    return {str(name): value for name, value in content.items() if isinstance(value, Header)}


@dataclass(frozen=True)
class _Storage:
    dtype: str
    values: int


class _Headers(pickle.Unpickler):
    """Unpickles a file of `torch.save`, with a stand-in for every class in it."""

    def __init__(self, file: Any, folder: str, sizes: Mapping[str, int]) -> None:
        super().__init__(file)
        self._folder = folder
        self._sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name; any other name ends the reading."""
        if module == "torch" and name in _STORAGES:
            return name
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Return a storage: `("storage", class, key, device, number of values)`."""
        _, kind, key, _, values = pid
        dtype, each = _STORAGES[kind]
        if self._sizes[f"{self._folder}{key}"] != values * each:
            raise pickle.UnpicklingError(f"storage {key} has another size")
        return _Storage(dtype, values)


def _tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Header:
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.values:
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return Header(tuple(size), storage.dtype)
