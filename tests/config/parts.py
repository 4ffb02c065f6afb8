"""A small table of sections, so that these tests stand without the model and the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

from minigpt4.registry import Component, Registry, component, name_field, path_field


class Mode(Enum):
    FAST = 1
    SLOW = 2


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
    @dataclass(frozen=True, kw_only=True)
    class Config:
        weights: str = path_field()
        grams: float = 1.5


class Bare:
    """A class a plugin forgot to give a Config."""


PARTS = Registry("part", {})
PARTS.register("wave")(Wave)
PARTS.register("stone")(Stone)
PARTS.register("bare")(Bare)


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int
    width: int = 4


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    part: Component = component(PARTS)
    other: Component = component(PARTS, default="wave")
    extra: Component | None = component(PARTS)
    many: dict[str, Component] = component(PARTS, many=True)
    inner: Inner
    layers: list[Inner] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RunSection:
    output_dir: str
    seed: int = 42
    rate: float = 1e-4
    device: Literal["auto", "cpu"] = "auto"
    part: str = name_field(PARTS, "wave")


@dataclass(frozen=True, kw_only=True)
class TrackingSection:
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
    mode: Mode = Mode.FAST
    folder: Path = Path("here")
    either: int | str = 3
    low: int = 0
    files: tuple[str, ...] = path_field(())
    file: str = path_field("")

    def __post_init__(self) -> None:
        if self.low > 10:
            raise ValueError(f"low must be 10 or less, found {self.low}")


TABLE = Registry(
    "section",
    {name: f"{__name__}:{cls}" for name, cls in (("model", "ModelSection"), ("run", "RunSection"))}
    | {"tracking": f"{__name__}:TrackingSection"},
)

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
