"""Weight files of image encoders as other tools save them: inside a dictionary, with a prefix before every name.

Input: a file, and the names that an encoder expects. Output: the tensors under these names. What was done is logged.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.weights import read_pickle, read_tensors, tensors_of

Tensors = dict[str, Tensor]
_log = logging.getLogger(__name__)


def read_tables(path: Path) -> dict[str, Tensors]:
    """Return the dictionaries of tensors in a file by the key that each is under; the file itself has the key "".

    Training tools save the weights under `state_dict`, `model`, `module` or another key, next to the optimizer.

    Raises:
        WeightsError: the file cannot be read, or contains no tensors.
    """
    if path.is_dir() or path.suffix == ".safetensors" or not path.is_file():
        return {"": read_tensors(path)}
    content: Any = read_pickle(path)
    if not isinstance(content, Mapping):
        tensors_of(content, path)  # raises
    parts = {"": content, **{str(key): value for key, value in content.items() if isinstance(value, Mapping)}}
    tables = {key: {str(n): t for n, t in part.items() if isinstance(t, Tensor)} for key, part in parts.items()}
    found = {key: tensors for key, tensors in tables.items() if tensors}
    if not found:
        raise WeightsError(f"{path}: contains no tensors; its keys are {', '.join(map(str, list(content)[:5]))}")
    return found


def read_encoder(path: Path, expected: Set[str], renamed: Callable[[Tensors], Tensors]) -> tuple[Tensors, str]:
    """Read the tensors of an encoder under the names that it expects.

    If all expected names are in the file behind one prefix, such as `module.` or `visual.trunk.`, it is removed, and
    tensors without it are ignored, such as those of a text encoder.

    Args:
        path: the weight file.
        expected: the names of the encoder's tensors.
        renamed: changes names that are known to differ; called with the prefix removed.

    Returns:
        The tensors, and the file with the part that they come from, for messages. If no prefix fits, they are those of
        the prefix under which most names were found, and all others as they are.

    Raises:
        WeightsError: the file cannot be read, or the names fit behind several prefixes.
    """
    tables = read_tables(path)
    nearest, most = (next(iter(tables)), ""), 0
    fitting: dict[str, list[str]] = {}
    for key, tensors in tables.items():
        for prefix, count in _prefixes(tensors, expected).items():
            if expected <= renamed(_behind(prefix, tensors)).keys():
                fitting.setdefault(key, []).append(prefix)
            if count > most:
                nearest, most = (key, prefix), count
    key = next(iter(fitting), nearest[0])
    prefixes = fitting.get(key, [nearest[1]])
    if len(prefixes) > 1 and "" not in prefixes:
        raise WeightsError(
            f"{path}: has this encoder {len(prefixes)} times, behind the prefixes {', '.join(prefixes)}; save one of "
            "them to a file of its own"
        )
    prefix = "" if "" in prefixes else prefixes[0]
    tensors = tables[key]
    inside = renamed(_behind(prefix, tensors))
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    place = str(path) + (f", {key!r}" if key else "") + (f", behind the prefix {prefix!r}" if prefix else "")
    if not fitting:
        return others | inside, place
    if key:
        also = [other for other in fitting if other != key]
        _log.info("%s: read from %r%s", path, key, f"; {', '.join(also)} would fit as well" if also else "")
    if prefix:
        _log.info("%s: prefix %r removed, %d other tensors ignored", path, prefix, len(others))
    return inside, place


def _prefixes(tensors: Tensors, expected: Set[str]) -> dict[str, int]:
    """Return the prefixes behind which at least half of the expected names are found, each with their number."""
    counts = Counter(prefix for name in tensors for prefix in _starts(name) if name.removeprefix(prefix) in expected)
    return {prefix: count for prefix, count in counts.items() if 2 * count >= len(expected)}


def _starts(name: str) -> Iterator[str]:
    """Yield everything that a name starts with, up to each of its dots; first nothing."""
    yield ""
    yield from (name[: place + 1] for place, letter in enumerate(name) if letter == ".")


def _behind(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
