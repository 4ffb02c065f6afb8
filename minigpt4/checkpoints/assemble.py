"""From a name, a YAML file or a checkpoint to a model that is ready to use: `load_model`.

Input: a name or path, or a config. Output: `LoadedModel`, the model with its conversation encoder and image processor,
for training, chat and evaluation.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minigpt4.assets import is_cached, mentioned, resolve
from minigpt4.checkpoints.inspection import check_kinds
from minigpt4.checkpoints.manifest import FILE as MANIFEST
from minigpt4.checkpoints.manifest import Manifest, check_parts
from minigpt4.checkpoints.released import read_released
from minigpt4.checkpoints.start import Start
from minigpt4.checkpoints.store import CONFIG
from minigpt4.checkpoints.transfer import needs_transfer, transferred
from minigpt4.config import Config, load_config, load_saved_config, missing_files
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.devices import choose_device
from minigpt4.errors import CheckpointError, ConfigError, FeatureCacheError
from minigpt4.feature_cache.reader import FeatureCache
from minigpt4.models.freezing import part_of
from minigpt4.models.image_side import ImageSide
from minigpt4.models.language_model import needs_own_code
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.processors.image import ImageProcessor
from minigpt4.registry import MODELS, RESAMPLERS
from minigpt4.weights import load_strict

PICKLES = (".pth", ".pt", ".bin")
_log = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A model, and what it needs for dialogues and images.

    Attributes:
        model: the model, in eval mode unless it is being trained.
        conversation: encodes dialogues as tokens, with the template of the config.
        image_processor: turns images into `pixel_values` for the vision encoder.
        config: the configuration that it was built from.
        manifest: of the checkpoint that it was loaded from, None without one.
    """

    model: MiniGPT4
    conversation: ConversationEncoder
    image_processor: ImageProcessor
    config: Config
    manifest: Manifest | None = None


def load_model(name_or_path: str | Path, options: Sequence[str] = (), device: str = "auto") -> LoadedModel:
    """Load a model for chat or evaluation.

    Args:
        name_or_path: the name of a file in `eval_configs/` (`mini`), a YAML file, a checkpoint folder, or a released
            MiniGPT-4 file, whose other parts are set by `options`.
        options: overrides `section.key=value`.
        device: auto, cpu, cuda or mps.

    Raises:
        ConfigError, WeightsError, CheckpointError, AssetError: the model cannot be loaded.
    """
    path = Path(name_or_path)
    start = f"model.init_from={json.dumps(str(path))}"
    if (path / MANIFEST).is_file():
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{path}: {CONFIG} is missing")
        # Where its own start came from does not matter any more, and may not be on this machine.
        return load_configured(
            load_saved_config(path / CONFIG, [*options, start, "model.start.trained_with=''"]), device
        )
    if path.is_dir():
        raise CheckpointError(
            f"{path}: is not a checkpoint: {MANIFEST} is missing; python -m minigpt4 inspect {path} says what it is"
        )
    if path.is_file() and path.suffix in PICKLES:
        release = read_released(path).release
        if release is None:
            raise CheckpointError(
                f"{path}: its sizes are not those of a released model; set model.init_from to it in a config that "
                "describes its parts"
            )
        name_or_path, options = release.config, [*options, start]
    return load_configured(load_config(name_or_path, options), device)


def load_configured(config: Config, device: str = "auto") -> LoadedModel:
    """Load the model of a config for chat or evaluation, in eval mode on a device.

    Raises:
        ConfigError, WeightsError, CheckpointError, AssetError: the model cannot be loaded.
    """
    loaded = assemble(config, same_template=True)
    loaded.model.to(choose_device(device)).eval()
    return loaded


def assemble(config: Config, *, same_template: bool = False, features: FeatureCache | None = None) -> LoadedModel:
    """Build the model of a config, with the trained tensors of `model.init_from` if it names a checkpoint.

    Everything that names and headers show is checked before weights are loaded.

    Args:
        config: the configuration.
        same_template: require the conversation template that the checkpoint was trained with.
        features: the cache to train from; then image encoder and resampler are not loaded.

    Raises:
        ConfigError, WeightsError, CheckpointError, AssetError: the model cannot be built.
        FeatureCacheError: the checkpoint does not go with the cached features.
    """
    check_files(config, "model", without=IMAGE_SIDE if features is not None else ())
    if features is None:
        check_kinds(config)
    start = Start.at(config.model.init_from) if config.model.init_from else None
    other = config.model.start.trained_with
    if start is not None:
        start.check_language_model(config.model.language_model.config.path, other)
        if same_template:
            start.check_template(config.conversation.template)
        if features is not None:
            _check_untrained(start, config)
    loaded = _build(config, features)
    if start is not None:
        if other and needs_transfer(start.manifest, loaded.model):
            tensors = transferred(loaded.model, loaded.conversation.tokenizer, start, other)
            _load_tensors(loaded.model, tensors, str(start.place))
        else:
            load_trained(loaded.model, start)
        if features is not None:
            check_calibrated(loaded.model, features, start.place)
        loaded.manifest = start.manifest
    return loaded


def build_image_side(config: Config) -> ImageSide:
    """Build image encoder and resampler alone, with what `model.init_from` calibrated; for the feature cache.

    Raises:
        ConfigError, WeightsError, CheckpointError, AssetError: they cannot be built.
    """
    start = Start.at(config.model.init_from) if config.model.init_from else None
    if start is not None:
        _check_untrained(start, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        image_side = ImageSide.from_config(config.model)
    if start is not None:
        check_parts(start.manifest, image_side, str(start.place))
        tensors = {name: tensor for name, tensor in start.read().items() if name.startswith("resampler.")}
        load_strict(image_side, tensors, source=str(start.place), optional=lambda name: name not in tensors)
    return image_side


def check_calibrated(model: MiniGPT4, features: FeatureCache, place: Path) -> None:
    """Raise FeatureCacheError if a checkpoint was calibrated otherwise than the resampler that made cached features.

    Args:
        model: with the tensors of the checkpoint.
        features: the cache.
        place: the checkpoint, for the message.
    """
    for name, cached in features.calibrated().items():
        if not torch.equal(getattr(model.resampler, name).cpu(), cached):
            raise FeatureCacheError(
                f"{features.folder}: the cached features were made with another {name} of the resampler than that of "
                f"{place}; write a cache with model.init_from={place}"
            )


def _check_untrained(start: Start, config: Config) -> None:
    """Raise FeatureCacheError if a checkpoint has trained its image encoder or resampler: a cache holds frozen ones.

    What a resampler only calibrates, such as the directions of `type: prefix`, is not training.
    """
    calibrated = RESAMPLERS.get(config.model.resampler.type).calibrated
    wrong = [
        name
        for name in start.manifest.trained
        if name.startswith(("vision_encoder.", "resampler.")) and name.removeprefix("resampler.") not in calibrated
    ]
    if wrong:
        raise FeatureCacheError(
            f"{start.place}: its training changed {wrong[0].partition('.')[0]} ({wrong[0]}), and cached features are "
            "those of frozen parts; leave datasets.feature_cache empty"
        )


IMAGE_SIDE = ("model.vision_encoder", "model.resampler")
"""What training from cached features does not load."""


def check_files(config: Config, *sections: str, without: Sequence[str] = ()) -> None:
    """Raise ConfigError with every file and asset in these sections that does not exist or would have to run code.

    Args:
        config: the configuration.
        sections: the sections that are checked.
        without: keys whose files are not needed, `model.vision_encoder`.
    """
    unneeded = tuple(f"{key}:" for key in without) + tuple(f"{key}." for key in without)
    problems = [problem for problem in missing_files(config, *sections) if not problem.startswith(unneeded)]
    values = [
        value
        for section in sections
        for key, value in config.values[section].items()
        if f"{section}.{key}" not in without
    ]
    assets = [name for name in mentioned(values) if not is_cached(name)]
    if assets:
        problems.append(
            f"not on this machine yet: {', '.join(assets)}; run python -m minigpt4 assets {' '.join(assets)}"
        )
    if not problems and "model" in sections and "model.language_model" not in without:
        reason = needs_own_code(resolve(config.model.language_model.config.path))
        problems += [f"model.language_model.path: {reason}"] * bool(reason)
    if problems:
        raise ConfigError(problems)


def load_trained(model: MiniGPT4, start: Start) -> None:
    """Copy the trained tensors of a checkpoint into a model, after checking that its frozen parts are the same.

    Raises:
        CheckpointError: the frozen parts differ, the model does not have one of the tensors, or one has values that
            training does not produce.
    """
    place = str(start.place)
    check_parts(start.manifest, model, place)
    tensors = start.read()
    _check_projector(model, tensors, place)
    _load_tensors(model, tensors, place)


def _load_tensors(model: MiniGPT4, tensors: Mapping[str, Tensor], place: str) -> None:
    """Copy trained tensors into a model."""
    unknown = sorted(tensors.keys() - model.state_dict().keys())
    if unknown:
        raise CheckpointError(
            f"{place}: has trained {', '.join(unknown[:3])}, which this model does not have; set "
            "model.language_model.lora as in training"
        )
    _check_values(model, tensors, place)
    report = load_strict(model, tensors, source=place, optional=lambda name: name not in tensors)
    model.inherited = frozenset(tensors)
    _log.info("%s", report)


def _check_projector(model: MiniGPT4, tensors: Mapping[str, Tensor], place: str) -> None:
    """Raise CheckpointError if a checkpoint has another projector than the model: one of them would stay untrained."""
    theirs = {name for name in tensors if part_of(name) == "llama_proj"}
    ours = {name for name in model.state_dict() if part_of(name) == "llama_proj"}
    if theirs and theirs != ours:
        raise CheckpointError(
            f"{place}: trained with a projector of {', '.join(sorted(theirs))}; yours has {', '.join(sorted(ours))}; "
            "set model.projector as in training"
        )


def _check_values(model: MiniGPT4, tensors: Mapping[str, Tensor], place: str) -> None:
    """Raise CheckpointError unless tensors are of the kind that the model has, and finite; copying would cast them."""
    expected, wrong = model.state_dict(), []
    for name, tensor in tensors.items():
        kind, own = tensor.dtype, expected[name].dtype
        if kind.is_floating_point != own.is_floating_point or not (kind.is_floating_point or kind == own):
            wrong.append(f"{name} is {kind}, should be {own}")
        elif bad := int((~torch.isfinite(tensor.to(own))).sum()):
            wrong.append(f"{name} has {bad:,} of {tensor.numel():,} values that are not finite")
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{place}: does not hold the weights of a trained model: {', '.join(wrong[:5])}{more}; use "
            "another checkpoint"
        )


def _build(config: Config, features: FeatureCache | None) -> LoadedModel:
    section = config.model
    tokenizer = TextTokenizer.from_path(resolve(section.language_model.config.path))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        stand_ins = {} if features is None else {"image_side": _cached_image_side(features)}
        model: MiniGPT4 = MODELS.get(section.type).from_config(section, **stand_ins)
    tokenizer.fit(model.language_model.vocab_size)
    settings = config.conversation
    if settings.max_tokens > model.language_model.context_length:
        settings = replace(settings, max_tokens=model.language_model.context_length)
    if settings.isolate_turns or config.run.pack:
        model.language_model.attention_kinds()  # raises now instead of at the first batch
        if model.language_model.model.config._attn_implementation == "flash_attention_2":
            raise ConfigError(
                "conversation.isolate_turns and run.pack need attention masks that flash_attention_2 does not "
                "support; set model.language_model.attn_implementation to sdpa"
            )
    encoder = ConversationEncoder(tokenizer, model.num_query_tokens, settings, config.compat)
    processor = config.processors.image.build(spec=model.vision_encoder.image_spec)
    return LoadedModel(model, encoder, processor, config)


def _cached_image_side(features: FeatureCache) -> ImageSide:
    sizes = (features.num_query_tokens, features.feature_dim)
    return ImageSide.from_cache(features.parts, features.image_spec, sizes, features.calibrated())
