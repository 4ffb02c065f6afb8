"""From a name, a YAML or a checkpoint folder to a model that is ready: `load_model`.

Input: what to load. Output: `LoadedModel`, the model with its conversation encoder and image processor. Training,
chat and evaluation all assemble here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minigpt4.assets import missing_assets, resolve
from minigpt4.checkpoints.inspection import check_kinds
from minigpt4.checkpoints.manifest import FILE as MANIFEST
from minigpt4.checkpoints.manifest import Manifest, check_parts
from minigpt4.checkpoints.published import read_released
from minigpt4.checkpoints.start import Start
from minigpt4.checkpoints.store import CONFIG
from minigpt4.config import Config, load_config, missing_files
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.devices import choose_device
from minigpt4.errors import CheckpointError, ConfigError
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.processors.image import ImageProcessor
from minigpt4.weights import load_strict

PICKLES = (".pth", ".pt", ".bin")
_log = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A model and what belongs to it.

    Attributes:
        model: the model, in eval mode unless it is being trained.
        encoder: dialogues to tokens, by the template the model was trained with.
        image_processor: images to what its vision encoder takes.
        config: everything it was built from.
        manifest: of the checkpoint it was loaded from, None for a fresh model.
    """

    model: MiniGPT4
    encoder: ConversationEncoder
    image_processor: ImageProcessor
    config: Config
    manifest: Manifest | None = None


def load_model(name_or_path: str | Path, options: Sequence[str] = (), device: str = "auto") -> LoadedModel:
    """Load a model for chat or evaluation.

    Args:
        name_or_path: the name of a file in `eval_configs/` (`mini`), a YAML file, a checkpoint folder, or a released
            MiniGPT-4 file, whose parts `options` name.
        options: overrides `section.key=value`.
        device: auto, cpu, cuda or mps.

    Raises:
        ConfigError, WeightsError, CheckpointError, AssetError: it cannot be loaded, and why.
    """
    path = Path(name_or_path)
    if (path / MANIFEST).is_file():
        return load_configured(_config_of(path, options), device)
    if path.is_dir():
        raise CheckpointError(
            f"{path}: is no checkpoint, it has no {MANIFEST}; python -m minigpt4 inspect {path} tells what it is"
        )
    if path.is_file() and path.suffix in PICKLES:
        release = read_released(path).release
        if release is None:
            raise CheckpointError(
                f"{path}: its sizes are those of none of the released models; pass it as model.init_from of a config "
                "that describes its parts"
            )
        name_or_path, options = release.config, [*options, _start_option(path)]
    return load_configured(load_config(name_or_path, options), device)


def load_configured(config: Config, device: str = "auto") -> LoadedModel:
    """Load the model of a config for chat or evaluation.

    Raises:
        ConfigError, WeightsError, CheckpointError, AssetError: it cannot be loaded, and why.
    """
    start = _start_of(config)
    if start is not None:
        start.check_template(config.conversation.template)
    loaded = _assemble(config, start)
    loaded.model.to(choose_device(device)).eval()
    return loaded


def assemble(config: Config) -> LoadedModel:
    """Build the model of a config, with `model.init_from` loaded if it names a checkpoint.

    Everything that can be told from names and headers is checked before anything is loaded.

    Raises:
        ConfigError, WeightsError, CheckpointError, AssetError: it cannot be built, and why.
    """
    return _assemble(config, _start_of(config))


def _start_of(config: Config) -> Start | None:
    """Return what the model of a config starts from, after checking that its files are what they should be."""
    config.require("model")
    check_files(config, "model")
    check_kinds(config)
    if not config.model.init_from:
        return None
    start = Start.at(config.model.init_from)
    start.check_language_model(config.model.language_model.config.path)
    return start


def _assemble(config: Config, start: Start | None) -> LoadedModel:
    loaded = _build(config)
    if start is not None:
        load_trained(loaded.model, start)
        loaded.manifest = start.manifest
    return loaded


def check_files(config: Config, *only: str) -> None:
    """Raise ConfigError naming every file and asset that is not here, of the sections `only` or of all."""
    sections = {name: config.values.get(name) for name in only} if only else config.values
    problems = missing_files(config, *only)
    absent = missing_assets(sections)
    if absent:
        problems.append(f"not on this machine yet: {', '.join(absent)}: python -m minigpt4 assets {' '.join(absent)}")
    if problems:
        raise ConfigError(problems)


def load_trained(model: MiniGPT4, start: Start) -> None:
    """Copy the trained tensors of a checkpoint into the model, after checking that its frozen parts are the same.

    Raises:
        CheckpointError: other parts, or tensors that this model does not have.
    """
    place = str(start.place)
    check_parts(start.manifest, model, place)
    tensors = start.read()
    foreign = sorted(tensors.keys() - model.state_dict().keys())
    if foreign:
        raise CheckpointError(
            f"{place}: has trained {', '.join(foreign[:3])}, which this model does not have; "
            "is model.language_model.lora set as it was in training?"
        )
    report = load_strict(model, tensors, source=place, optional=lambda name: name not in tensors)
    model.inherited = frozenset(tensors)
    _log.info("%s", report)


def _config_of(folder: Path, options: Sequence[str]) -> Config:
    """Return a checkpoint's own config, starting from it; only then is it sure that nothing differs from training."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG}")
    return load_config(path, [*options, _start_option(folder)])


def _start_option(path: Path) -> str:
    return f"model.init_from={json.dumps(str(path))}"


def _build(config: Config) -> LoadedModel:
    section = config.model
    tokenizer = TextTokenizer.from_path(resolve(section.language_model.config.path))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed if config.run is not None else 0)
        model: MiniGPT4 = section.build()
    tokenizer.fit(model.language_model.vocab_size)
    settings = config.conversation
    if settings.max_tokens > model.language_model.context_length:
        settings = replace(settings, max_tokens=model.language_model.context_length)
    if settings.isolate_turns:
        model.language_model.attention_kinds()  # raises now, and not at the first batch
    if settings.isolate_turns and model.language_model.model.config._attn_implementation == "flash_attention_2":
        raise ConfigError(
            "conversation.isolate_turns needs attention masks that flash_attention_2 does not take: use sdpa"
        )
    encoder = ConversationEncoder(tokenizer, model.num_query_tokens, settings, config.compat)
    processor = config.processors.image.build(spec=model.vision_encoder.image_spec)
    return LoadedModel(model, encoder, processor, config)
