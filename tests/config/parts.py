"""A small configuration, so that these tests do not need the model and the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from minigpt4.config import FilePath, NameIn, OneOf, settings
from minigpt4.config.schema import plain
from minigpt4.config.sources import to_yaml
from minigpt4.registry import Component, Registry


class Wave:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        length: int = 3
        name: str = "wave"

    def __init__(self, config: Config, tone: int) -> None:
        self.config, self.tone = config, tone

    @classmethod
    def from_config(cls, config: Config, tone: int) -> Wave:
        return cls(config, tone)


class Stone:
    """A plugin's settings are a plain dataclass."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        weights: Annotated[str, FilePath()]
        grams: float = 1.5


class Bare:
    """A class a plugin forgot to give a Config."""


PARTS = Registry("part", {})
PARTS.register("wave")(Wave)
PARTS.register("stone")(Stone)
PARTS.register("bare")(Bare)


@settings
class Inner:
    depth: int
    width: int = 4


@settings
class ModelPart:
    part: Annotated[Component, OneOf(PARTS)]
    other: Annotated[Component, OneOf(PARTS, default="wave")]
    extra: Annotated[Component, OneOf(PARTS)] | None = None
    many: dict[str, Annotated[Component, OneOf(PARTS)]] = field(default_factory=dict)
    inner: Inner
    layers: list[Inner] = field(default_factory=list)


@settings
class RunPart:
    output_dir: str
    """Where output is written."""
    seed: int = 42
    rate: Annotated[float, Ge(0)] = 1e-4
    device: Literal["auto", "cpu"] = "auto"
    part: Annotated[str, NameIn(PARTS)] = "wave"


@settings
class TrackingPart:
    """Every kind of plain value; all with defaults."""

    FORMAT: ClassVar[int] = 1
    flag: bool = False
    text: str = ""
    note: str | None = None
    count: int | None = None
    pair: tuple[float, float] = (0.9, 0.999)
    names: tuple[str, ...] = ("a",)
    grid: list[list[int]] = field(default_factory=lambda: [[1, 2]])
    scores: dict[str, float] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path("here")
    either: int | str = 3
    low: Annotated[int, Le(10)] = 0
    high: int = 20
    files: Annotated[tuple[str, ...], FilePath()] = ()
    file: Annotated[str, FilePath()] = ""

    def __post_init__(self) -> None:
        if self.high < self.low:
            raise ValueError(f"high must not be below low, found {self.high}")


@settings
class Small:
    compat: Literal["ours", "published"] = "ours"
    plugins: tuple[str, ...] = ()
    model: ModelPart
    run: RunPart
    tracking: TrackingPart = field(default_factory=TrackingPart)

    @cached_property
    def values(self) -> dict[str, Any]:
        return plain(self)

    def to_yaml(self) -> str:
        return to_yaml(self.values)


GOOD = """\
model:
  part:
    type: stone
    weights: random
  inner:
    depth: 2
run:
  output_dir: out
"""
