"""Names in YAML and what they stand for: one page of tables, resolved on first use.

Input: the name under a `type:` key. Output: the class, or the class of its settings, imported only now. Nothing here
imports a heavy library. Outside code adds its own with `@MODELS.register("mine")`, imported through the top-level
`plugins:` list.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from minigpt4.errors import UnknownNameError

Class = TypeVar("Class", bound=type)


def nearest(name: object, known: Iterable[str]) -> str | None:
    """Return the name in `known` that is most similar to `name`, or None when none is similar."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return near[0] if near else None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the name in `known` that is most similar to `name`, or nothing."""
    near = nearest(name, known)
    return f" Did you mean {near!r}?" if near else ""


class Registry:
    """A table from names to classes: `"module:Class"`, with the class of its settings, or registered by a plugin."""

    def __init__(self, kind: str, entries: Mapping[str, str | tuple[str, str]]) -> None:
        """Make a table.

        Args:
            kind: what the names stand for, in messages.
            entries: `"module:Class"`, or `("module:Class", "module:SettingsClass")`.
        """
        self.kind = kind
        self._entries: dict[str, str | tuple[str, str] | type] = dict(entries)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {self.names()})"

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def names(self) -> list[str]:
        """Return every known name, sorted."""
        return sorted(self._entries)

    def get(self, name: str) -> Any:
        """Return the class behind `name`, importing its module on first use.

        Raises:
            UnknownNameError: there is no such name; the message has the nearest one and the list of all.
        """
        entry = self._entry(name)
        return _imported(entry[0] if isinstance(entry, tuple) else entry)

    def settings(self, name: str) -> Any:
        """Return the settings dataclass of the class behind `name`, without importing the class if it can be avoided.

        Raises:
            UnknownNameError: there is no such name, or its class has no dataclass `Config`.
        """
        entry = self._entry(name)
        if isinstance(entry, tuple):
            return _imported(entry[1])
        cls = _imported(entry)
        config = getattr(cls, "Config", None)
        if not dataclasses.is_dataclass(config):
            raise UnknownNameError(f"{cls.__qualname__} has no dataclass Config")
        return config

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

    def _entry(self, name: str) -> str | tuple[str, str] | type:
        if name not in self:
            near = did_you_mean(name, self._entries)
            raise UnknownNameError(f"unknown {self.kind} {name!r}.{near} Known: {', '.join(self.names())}")
        return self._entries[name]


def _imported(entry: str | type) -> Any:
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _place(entry: str | tuple[str, str] | type) -> str:
    if isinstance(entry, type):
        return f"{entry.__module__}:{entry.__qualname__}"
    return entry[0] if isinstance(entry, tuple) else entry


@dataclass(frozen=True)
class Component:
    """A validated part of a config: a name, its registry, and the settings of the class behind the name."""

    registry: Registry
    type: str
    config: Any

    def build(self, **parts: Any) -> Any:
        """Build the part: `Class.from_config(config, **parts)`."""
        return self.registry.get(self.type).from_config(self.config, **parts)


_PARTS = "minigpt4.config.parts"
_TASKS = "minigpt4.config.tasks"

MODELS = Registry("model", {"minigpt4": "minigpt4.models.minigpt4:MiniGPT4"})

VISION_ENCODERS = Registry(
    "vision encoder",
    {
        "eva_vit_g": ("minigpt4.models.vision:EvaViTG", f"{_PARTS}:EvaViTGConfig"),
        "timm": ("minigpt4.models.vision:TimmEncoder", f"{_PARTS}:TimmConfig"),
        "transformers": (
            "minigpt4.models.transformers_encoder:TransformersEncoder",
            f"{_PARTS}:TransformersEncoderConfig",
        ),
    },
)

RESAMPLERS = Registry(
    "resampler",
    {
        "qformer": ("minigpt4.models.resampler:QFormer", f"{_PARTS}:QFormerConfig"),
        "merge": ("minigpt4.models.resampler:Merge", f"{_PARTS}:MergeConfig"),
        "pool": ("minigpt4.models.resampler:Pool", f"{_PARTS}:PoolConfig"),
        "prefix": ("minigpt4.models.resampler:Prefix", f"{_PARTS}:PrefixConfig"),
        "patches": ("minigpt4.models.resampler:Patches", f"{_PARTS}:PatchesConfig"),
        "pixel_shuffle": ("minigpt4.models.resampler:PixelShuffle", f"{_PARTS}:PixelShuffleConfig"),
    },
)

PROJECTORS = Registry(
    "projector",
    {
        "linear": ("minigpt4.models.projector:Linear", f"{_PARTS}:LinearConfig"),
        "mlp": ("minigpt4.models.projector:Mlp", f"{_PARTS}:MlpConfig"),
    },
)

LANGUAGE_MODELS = Registry(
    "language model",
    {"causal_lm": ("minigpt4.models.language_model:LanguageModel", f"{_PARTS}:LanguageModelConfig")},
)

DATASETS = Registry(
    "dataset",
    {
        "web_pairs": ("minigpt4.datasets.web_pairs:WebPairs", f"{_PARTS}:WebPairsConfig"),
        "aligned_pairs": ("minigpt4.datasets.aligned_pairs:AlignedPairs", f"{_PARTS}:AlignedPairsConfig"),
        "conversations": ("minigpt4.datasets.conversations:Conversations", f"{_PARTS}:ConversationsConfig"),
        "easy_vqa": ("minigpt4.datasets.easy_vqa:EasyVQA", f"{_PARTS}:EasyVQAConfig"),
        "easy_vqa_crossed": ("minigpt4.datasets.crossed_vqa:CrossedVQA", f"{_PARTS}:CrossedVQAConfig"),
    },
)

PROCESSORS = Registry(
    "processor",
    {
        "image": ("minigpt4.processors.image:ImageProcessor", f"{_PARTS}:ImageProcessorConfig"),
        "text": ("minigpt4.processors.text:TextProcessor", f"{_PARTS}:TextProcessorConfig"),
        "blip_caption": ("minigpt4.processors.text:BlipCaption", f"{_PARTS}:BlipCaptionConfig"),
    },
)

TEMPLATES = Registry(
    "template",
    {name: f"minigpt4.conversation.templates:{name.upper()}" for name in ("plain", "vicuna_v0", "llama2", "chatml")},
)

SCORERS = Registry(
    "scorer",
    {
        "exact": "minigpt4.evaluation.scorers.answers:exact",
        "yes_no": "minigpt4.evaluation.scorers.answers:yes_no",
        "vqa": "minigpt4.evaluation.scorers.vqa:official",
        "vizwiz": "minigpt4.evaluation.scorers.vqa:vizwiz",
        "choices": "minigpt4.evaluation.scorers.choices:choices",
        "captions": "minigpt4.evaluation.scorers.captions:captions",
        "failures": "minigpt4.evaluation.scorers.failures:failures",
    },
)

TASKS = Registry(
    "task",
    {
        "easy_vqa": ("minigpt4.evaluation.tasks.easy_vqa:EasyVqaTask", f"{_TASKS}:EasyVqaTaskConfig"),
        "rows": ("minigpt4.evaluation.tasks.rows:RowsTask", f"{_TASKS}:RowsTaskConfig"),
        "captions": ("minigpt4.evaluation.tasks.captions:CaptionsTask", f"{_TASKS}:CaptionsTaskConfig"),
        "vqa": ("minigpt4.evaluation.tasks.vqa:VqaTask", f"{_TASKS}:VqaTaskConfig"),
        "choices": ("minigpt4.evaluation.tasks.choices:ChoicesTask", f"{_TASKS}:ChoicesTaskConfig"),
        "pope": ("minigpt4.evaluation.tasks.pope:PopeTask", f"{_TASKS}:PopeTaskConfig"),
    },
)

RUNNERS = Registry(
    "runner",
    {
        "train": "minigpt4.runners.train:TrainRunner",
        "evaluate": "minigpt4.runners.evaluate:EvaluateRunner",
    },
)

REGISTRIES: dict[str, Registry] = {
    "models": MODELS,
    "vision_encoders": VISION_ENCODERS,
    "resamplers": RESAMPLERS,
    "projectors": PROJECTORS,
    "language_models": LANGUAGE_MODELS,
    "datasets": DATASETS,
    "processors": PROCESSORS,
    "templates": TEMPLATES,
    "runners": RUNNERS,
    "tasks": TASKS,
    "scorers": SCORERS,
}
