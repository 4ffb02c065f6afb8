"""Names in YAML and the classes they stand for: one page of tables, resolved on first use.

Input: the name under a `type:` key. Output: the class, imported only now. Nothing here imports a heavy
library. Outside code adds its own with `@MODELS.register("mine")`, imported through the top-level `plugins:`
list.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from minigpt4.errors import UnknownNameError

Class = TypeVar("Class", bound=type)


def nearest(name: object, known: Iterable[str]) -> str | None:
    """Return the name in `known` that is most like `name`, or None when none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return near[0] if near else None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the name in `known` that is most like `name`, or nothing."""
    near = nearest(name, known)
    return f" Did you mean {near!r}?" if near else ""


class Registry:
    """A table from names to classes, each class given as `"module:Class"` or registered by a plugin."""

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries: dict[str, str | type] = dict(entries)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {self.names()})"

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def names(self) -> list[str]:
        """Return every known name, sorted."""
        return sorted(self._entries)

    def get(self, name: str) -> type[Any]:
        """Return the class behind `name`, importing its module on first use.

        Raises:
            UnknownNameError: no such name; the message has the nearest one and the list of all.
        """
        if name not in self:
            near = did_you_mean(name, self._entries)
            raise UnknownNameError(f"unknown {self.kind} {name!r}.{near} Known: {', '.join(self.names())}")
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            self._entries[name] = entry = getattr(importlib.import_module(module), attribute)
        return entry

    def register(self, name: str) -> Callable[[Class], Class]:
        """Class decorator for plugins: `@MODELS.register("mine")`.

        Importing the same plugin twice (a notebook, `importlib.reload`) replaces its class.

        Raises:
            UnknownNameError: the name is taken by another class.
        """

        def add(cls: Class) -> Class:
            taken = self._entries.get(name, cls)
            if _place(taken) != _place(cls):
                raise UnknownNameError(
                    f"{self.kind} {name!r} is already registered by {_place(taken)}; choose another name"
                )
            self._entries[name] = cls
            return cls

        return add


def _place(entry: str | type) -> str:
    return entry if isinstance(entry, str) else f"{entry.__module__}:{entry.__qualname__}"


@dataclass(frozen=True)
class Component:
    """A validated part of a config: a name, its registry, and the config dataclass of the class behind it."""

    registry: Registry
    type: str
    config: Any

    def build(self, **parts: Any) -> Any:
        """Build the part: `Class.from_config(config, **parts)`."""
        return self.registry.get(self.type).from_config(self.config, **parts)


def component(registry: Registry, *, default: str | None = None, many: bool = False) -> Any:
    """Declare a config field that holds a `Component` (or, with `many`, a mapping from names to them).

    A field annotated `Component | None` without a default is None when its section is absent.

    Args:
        registry: where the value of the `type:` key is looked up.
        default: the `type` used when the YAML names none; without it `type` is required.
        many: the field is a mapping of names to components, empty when absent.
    """
    return field(metadata={"registry": registry, "default": default, "many": many})


def path_field(default: Any = dataclasses.MISSING, *, words: tuple[str, ...] = ("random",)) -> Any:
    """Declare a config field that holds the path of a file or folder, or a list of them.

    Before a job starts `minigpt4.config.missing_files` names every such path that does not exist. Not looked
    for: null, the empty text, `asset:NAME`, URLs and the values in `words`.

    Args:
        default: the value when the YAML has none; without it the field is required.
        words: values that are no paths (`weights: random`).
    """
    return field(default=default, metadata={"path": True, "words": words})


def name_field(registry: Registry, default: Any = dataclasses.MISSING) -> Any:
    """Declare a config field that holds a name of `registry`, checked when the config is read."""
    return field(default=default, metadata={"names": registry})


MODELS = Registry("model", {"minigpt4": "minigpt4.models.minigpt4:MiniGPT4"})

VISION_ENCODERS = Registry(
    "vision encoder",
    {
        "eva_vit_g": "minigpt4.models.vision:EvaViTG",
        "timm": "minigpt4.models.vision:TimmEncoder",
    },
)

RESAMPLERS = Registry(
    "resampler",
    {
        "qformer": "minigpt4.models.resampler:QFormer",
        "merge": "minigpt4.models.resampler:Merge",
        "pool": "minigpt4.models.resampler:Pool",
        "prefix": "minigpt4.models.visual_prefix:Prefix",
    },
)

LANGUAGE_MODELS = Registry("language model", {"causal_lm": "minigpt4.models.language_model:LanguageModel"})

DATASETS = Registry(
    "dataset",
    {
        "web_pairs": "minigpt4.datasets.web_pairs:WebPairs",
        "aligned_pairs": "minigpt4.datasets.aligned_pairs:AlignedPairs",
        "conversations": "minigpt4.datasets.conversations:Conversations",
        "easy_vqa": "minigpt4.datasets.easy_vqa:EasyVQA",
    },
)

PROCESSORS = Registry(
    "processor",
    {
        "image": "minigpt4.processors.image:ImageProcessor",
        "text": "minigpt4.processors.text:TextProcessor",
        "blip_caption": "minigpt4.processors.text:BlipCaption",
    },
)

RUNNERS = Registry(
    "runner",
    {
        "train": "minigpt4.runners.train:TrainRunner",
        "evaluate": "minigpt4.runners.evaluate:EvaluateRunner",
    },
)

SECTIONS = Registry(
    "section",
    {
        "model": "minigpt4.models.minigpt4:ModelSection",
        "processors": "minigpt4.processors.section:ProcessorsSection",
        "conversation": "minigpt4.conversation.encoder:ConversationSection",
        "datasets": "minigpt4.datasets.section:DatasetsSection",
        "run": "minigpt4.config.sections:RunSection",
        "tracking": "minigpt4.config.sections:TrackingSection",
        "chat": "minigpt4.chat.section:ChatSection",
        "evaluation": "minigpt4.evaluation.section:EvaluationSection",
        "server": "minigpt4.server.section:ServerSection",
        "demo": "minigpt4.demo.section:DemoSection",
    },
)

REGISTRIES: dict[str, Registry] = {
    "models": MODELS,
    "vision_encoders": VISION_ENCODERS,
    "resamplers": RESAMPLERS,
    "language_models": LANGUAGE_MODELS,
    "datasets": DATASETS,
    "processors": PROCESSORS,
    "runners": RUNNERS,
    "sections": SECTIONS,
}
