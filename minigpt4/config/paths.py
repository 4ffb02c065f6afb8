"""Where the files that travel with the package are: configs, prompts, the mini checkpoint.

In a source checkout they are at the top level; in an installed wheel under `minigpt4/shipped/`.
"""

from __future__ import annotations

from pathlib import Path

from minigpt4.errors import ConfigError
from minigpt4.registry import did_you_mean

SHIPPED = "shipped:"
"""The prefix of a path among the files that travel with the package."""
_PACKAGE = Path(__file__).resolve().parent.parent
_FOLDERS = ("configs", "eval_configs")
_SUFFIXES = (".yaml", ".yml")


def shipped(*parts: str) -> Path:
    """Return the path of a shipped file or folder, `shipped("prompts", "x.txt")`; it may not exist."""
    inside = _PACKAGE / "shipped"
    return (inside if inside.is_dir() else _PACKAGE.parent).joinpath(*parts)


def resolve_shipped(path: str) -> Path:
    """Return the path of a config value: `shipped:a/b` travels with the package, others are unchanged."""
    if path.startswith(SHIPPED):
        return shipped(*path.removeprefix(SHIPPED).split("/"))
    return Path(path)


def shipped_configs() -> list[str]:
    """Return the shipped configs that are jobs of their own, as `configs/stage1_pretrain.yaml`, sorted."""
    return [f"{name}/{file.name}" for name in _FOLDERS for file in sorted(shipped(name).glob("*.yaml"))]


def find_config(path: str | Path) -> Path:
    """Return the file meant by `path`.

    Args:
        path: a file; or the name of a shipped one: `mini_stage1` (looked for in `configs/`, then in
            `eval_configs/`), `configs/mini_stage1`, with or without `.yaml`.

    Raises:
        ConfigError: there is no such file; the message has the nearest name and the list of all.
    """
    given = Path(path)
    if given.is_file():
        return given
    name = given if given.suffix in _SUFFIXES else given.with_name(f"{given.name}.yaml") if given.name else given
    if len(name.parts) == 1:
        candidates = [shipped(folder, name.name) for folder in _FOLDERS]
    else:
        candidates = [shipped(*name.parts)] if given.parts and given.parts[0] in _FOLDERS else []
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = shipped_configs()
    hint = did_you_mean(name.stem, {Path(file).stem for file in known})
    found = f"{str(path)!r} is a folder, not a config file." if given.is_dir() else f"no config file {str(path)!r}."
    raise ConfigError(f"{found}{hint} Shipped: {', '.join(known) or 'none'}")
