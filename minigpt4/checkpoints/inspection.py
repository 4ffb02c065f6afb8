"""What a file or folder of weights is, which models it fits, and how to use it: `python -m minigpt4 inspect PATH`.

Input: a path. Output: an `Inspection`. Only names, shapes and headers are read; no code from the file is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.assets import PREFIX
from minigpt4.checkpoints.manifest import FILE as MANIFEST
from minigpt4.checkpoints.manifest import LATEST, WEIGHTS, Manifest
from minigpt4.checkpoints.released import inspect_released, is_released
from minigpt4.config import Config
from minigpt4.conversation.tokenizer_files import has_tokenizer
from minigpt4.errors import ConfigError, MiniGPT4Error, MissingDependencyError, WeightsError
from minigpt4.models.blip2_weights import folder_config, is_blip2_folder
from minigpt4.models.language_model_files import weight_files
from minigpt4.tensor_headers import Header, content_of_pickle, headers_of, headers_of_safetensors

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor | Header"]

ENCODER, RESAMPLER = "model.vision_encoder.weights", "model.resampler.weights"
TOWER = "model.vision_encoder.path"
LANGUAGE_MODEL, START = "model.language_model.path", "model.init_from"
PROMPT_FORMAT = "prompt_format.json"
"""A file that folders of `export --to huggingface` have, and other BLIP-2 folders do not."""
_WITH_TEXT_TOWER = ("clip", "siglip")
"""Families whose folders hold a text tower as well, of which nothing is used."""
_BLIP2_LLM = {
    ("t5_proj", 4096): "FlanT5-XXL",
    ("t5_proj", 2048): "FlanT5-XL",
    ("opt_proj", 2560): "OPT-2.7B",
    ("opt_proj", 4096): "OPT-6.7B",
}
"""By the layer after BLIP-2's Q-Former, and its width."""


@dataclass(frozen=True)
class Inspection:
    """What is known about a file or folder.

    Attributes:
        path: the file or folder.
        what: what it is, in a few words.
        options: the config keys that accept it; none if it cannot be used.
        facts: sizes and the models that it fits, one line each.
    """

    path: Path
    what: str
    options: tuple[str, ...] = ()
    facts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        use = "  pass as: --options " + " ".join(f"{option}={self.path}" for option in self.options)
        return "\n".join(
            [f"{self.path}: {self.what}", *(f"  {fact}" for fact in self.facts), *[use] * bool(self.options)]
        )


def inspect(path: str | Path) -> Inspection:
    """Return what a file or folder is.

    Raises:
        WeightsError, CheckpointError: it is missing, damaged, a web page, or contains foreign code.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.suffix == ".safetensors" and (path.parent / MANIFEST).is_file():
        return _checkpoint(path.parent)
    if path.suffix == ".pt" and path.is_file() and (lone := _single(path)) is not None:
        return _lone(path, lone)
    return _tensors(path, _read(path))


def check_kinds(config: Config) -> None:
    """Raise ConfigError if a file in the model section is of a kind that its option does not accept.

    Unknown and damaged files pass; loading them has its own messages.
    """
    model: Any = config.model
    given = {
        ENCODER: getattr(model.vision_encoder.config, "weights", ""),
        TOWER: getattr(model.vision_encoder.config, "path", ""),
        RESAMPLER: getattr(model.resampler.config, "weights", ""),
        LANGUAGE_MODEL: getattr(model.language_model.config, "path", ""),
        START: model.init_from,
    }
    problems = []
    for option, value in given.items():
        path = Path(value)
        if not value or value.startswith(PREFIX) or not path.exists():
            continue
        try:
            found = inspect(path)
        except MiniGPT4Error:
            continue
        if found.options and option not in found.options:
            problems.append(f"{option}: {value} is {found.what}; pass it as {' or '.join(found.options)}")
    if problems:
        raise ConfigError(problems)


def _tensors(path: Path, tensors: Tensors) -> Inspection:
    """Recognise a file by the names of its tensors."""
    facts = [_size(path, tensors)]
    if is_released(tensors):
        return _released(path, facts)
    if _has(tensors, query_tokens=3):
        return _qformer(path, tensors, facts)
    if "blocks.0.attn.q_bias" in tensors and _has(tensors, **{"pos_embed": 3, "patch_embed.proj.weight": 4}):
        return _eva(path, tensors, facts)
    first = ", ".join(list(tensors)[:3])
    return Inspection(path, "weights of an unknown model", (), [*facts, f"its first tensors: {first}"])


def _read(path: Path) -> Tensors:
    """Return the tensors of a file or their headers: torch is imported only for files that are not as usual.

    Raises:
        WeightsError: it is missing or damaged.
    """
    if path.is_file():
        is_safe = path.suffix == ".safetensors"
        found = headers_of_safetensors(path) if is_safe else headers_of(content_of_pickle(path))
        if found:
            return found
    from minigpt4.weights import read_tensors

    return read_tensors(path)


def _single(path: Path) -> Tensor | Header | None:
    """Return the tensor that is all of a pickle, or None if the file holds something else."""
    content = content_of_pickle(path)
    if content is None:
        from torch import Tensor

        from minigpt4.weights import read_pickle

        content = read_pickle(path)
        return content if isinstance(content, Tensor) else None
    return content if isinstance(content, Header) else None


def _lone(path: Path, tensor: Tensor | Header) -> Inspection:
    """Recognise a file of one tensor."""
    shape = " x ".join(map(str, tensor.shape))
    if tensor.ndim != 2:
        return Inspection(path, f"a single tensor of {shape}, which cannot be used")
    what = "prompt embeds, as `export --to prompt-embeds` writes them"
    kind = str(tensor.dtype).removeprefix("torch.")
    return Inspection(path, what, (), [f"{shape} (tokens x width of the language model), torch.{kind}"])


def _has(tensors: Tensors, **dimensions: int) -> bool:
    """Whether there are tensors of these names with these numbers of dimensions."""
    return all(name in tensors and tensors[name].ndim == number for name, number in dimensions.items())


def _eva(path: Path, tensors: Tensors, facts: list[str]) -> Inspection:
    width, patch = (tensors["patch_embed.proj.weight"].shape[n] for n in (0, 3))
    side = int((tensors["pos_embed"].shape[1] - 1) ** 0.5) * patch
    blocks = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    facts += [
        f"{blocks} blocks {width} wide, of which MiniGPT-4 uses all but the last; images of {side} x {side} pixels, "
        f"patches of {patch}",
        "fits every released MiniGPT-4: 7B, 13B, LLaMA-2"
        if (width, blocks) == (1408, 40)
        else f"not the published size (40 blocks 1408 wide): set depth to {blocks - 1}, embed_dim to {width}",
    ]
    return Inspection(path, "EVA-CLIP ViT-g, the image encoder", (ENCODER,), facts)


def _qformer(path: Path, tensors: Tensors, facts: list[str]) -> Inspection:
    _, queries, width = tensors["query_tokens"].shape
    at = "Qformer.bert.encoder.layer."
    layers = {name.removeprefix(at).split(".")[0] for name in tensors if name.startswith(at)}
    heads = [
        (h, tensors[f"{h}.weight"].shape[0]) for h in ("t5_proj", "opt_proj") if _has(tensors, **{f"{h}.weight": 2})
    ]
    llms = [_BLIP2_LLM.get(head, f"a language model {head[1]} wide") for head in heads]
    facts += [
        f"Q-Former of {len(layers)} layers {width} wide with {queries} queries; ln_vision "
        + ("included" if "ln_vision.weight" in tensors else "not included, so another file must contain it"),
        f"trained with {llms[0] if llms else 'an unknown language model'}; the released MiniGPT-4 7B and 13B require "
        "the one trained with FlanT5-XXL",
    ]
    return Inspection(path, "BLIP-2's Q-Former", (RESAMPLER,), facts)


def _released(path: Path, facts: list[str]) -> Inspection:
    released = inspect_released(path)
    width, query_width = released.tensors["llama_proj.weight"].shape
    facts += [f"llama_proj from query features {query_width} wide to a language model {width} wide"]
    stage = f"stage {released.manifest.stage}" if released.manifest.stage else "unknown stage"
    facts += [f"{stage}; {released.manifest.notes[0]}; {len(released.ignored)} buffers are not needed"]
    if released.release is None:
        return Inspection(path, "MiniGPT-4 checkpoint of an unusual size", (START,), facts)
    facts += [
        f"fits: {released.release.language_model}",
        f"chat: python -m minigpt4 chat --cfg-path {released.release.config} --options {START}={path} ...",
    ]
    return Inspection(path, f"MiniGPT-4 checkpoint for {released.release.language_model}", (START,), facts)


def _folder(path: Path) -> Inspection:
    if (path / MANIFEST).is_file():
        return _checkpoint(path)
    latest = path / "checkpoints" / LATEST
    if (latest / MANIFEST).is_file():
        return Inspection(path, f"run folder; its newest checkpoint is {latest}")
    config = folder_config(path)
    if is_blip2_folder(path):
        from minigpt4.weights import read_tensors  # in the shards that the index names

        names = read_tensors(path, lambda name: name == "query_tokens")
        queries = f"{names['query_tokens'].shape[1]} queries" if names else "no query_tokens, so no Q-Former"
        text = config.get("text_config")
        llm = text.get("model_type", "unknown") if isinstance(text, dict) else "unknown"
        facts = [
            f"{queries}; its language model ({llm}) is not used",
            "the released MiniGPT-4 7B and 13B require Salesforce/blip2-flan-t5-xxl",
        ]
        what = "Hugging Face BLIP-2: image encoder, ln_vision and Q-Former"
        if (path / PROMPT_FORMAT).is_file():
            what = "MiniGPT-4 for transformers, as `export --to huggingface` writes it; " + what
            facts[1:] = [f"use it: python {path / 'example.py'} --image FILE --question TEXT"]
        return Inspection(path, what, (ENCODER, RESAMPLER), facts)
    if tower := _tower_config(config):
        return _tower(path, config, tower)
    if "model_type" in config:
        return _language_model(path, config)
    raise WeightsError(
        f"{path}: the folder has neither {MANIFEST} nor a config.json with a model_type; give a file in it, or the "
        "folder of one model"
    )


def _checkpoint(folder: Path) -> Inspection:
    manifest = Manifest.read(folder)
    trained = _read(folder / WEIGHTS)
    facts = [
        _size(folder / WEIGHTS, trained),
        f"step {manifest.step} of {manifest.total_steps}; stage {manifest.stage or 'unknown'}; "
        f"{manifest.samples} samples, {manifest.tokens} tokens",
        f"template {manifest.template}; data {manifest.data or 'unknown'}",
        f"trained: {', '.join(manifest.trained)}",
    ]
    for name, part in manifest.parts.items():
        vocabulary = f", {part.vocabulary} tokens" if part.vocabulary else ""
        facts.append(
            f"with the {name} {part.type} {part.source or '(no weights of its own)'}, {part.width} wide{vocabulary}, "
            f"fingerprint {part.fingerprint}"
        )
    facts += [*manifest.notes, f"chat: python -m minigpt4 chat --cfg-path {folder} ..."]
    return Inspection(folder, f"checkpoint of minigpt4 {manifest.version}", (START,), facts)


def _tower_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the vision tower in a folder that has no language model; empty if there is none."""
    inner = config.get("vision_config")
    tower = inner if isinstance(inner, dict) and config.get("model_type") in _WITH_TEXT_TOWER else config
    return tower if "patch_size" in tower and "vocab_size" not in tower else {}


def _tower(folder: Path, config: Mapping[str, Any], tower: Mapping[str, Any]) -> Inspection:
    """Recognise the folder of a vision tower."""
    layers, width, side = (tower.get(key, "?") for key in ("num_hidden_layers", "hidden_size", "image_size"))
    size = sum(f.stat().st_size for f in weight_files(folder)) / 1e9
    facts = [
        f"{layers} blocks {width} wide; images of {side} pixels, patches of {tower['patch_size']}; {size:.2f} GB",
        "use it: model.vision_encoder: {type: transformers, path: ...}",
    ]
    return Inspection(folder, f"vision tower ({config.get('model_type', 'unknown')})", (TOWER,), facts)


def _language_model(folder: Path, config: Mapping[str, Any]) -> Inspection:
    """Recognise a folder saved by transformers, whose weight files must be complete."""
    inner = config.get("text_config")
    sizes = inner if isinstance(inner, dict) else config
    width, vocabulary, layers = (sizes.get(key, "?") for key in ("hidden_size", "vocab_size", "num_hidden_layers"))
    files = weight_files(folder)
    size = sum(f.stat().st_size for f in files) / 1e9
    precision = config.get("dtype") or config.get("torch_dtype") or "unknown precision"
    facts = [
        f"{layers} layers {width} wide, {vocabulary} tokens",
        f"{size:.2f} GB in {len(files)} file(s), {precision}",
        "tokenizer: " + ("included" if has_tokenizer(folder) else "MISSING, copy the tokenizer files here"),
    ]
    if (width, config.get("model_type")) in ((4096, "llama"), (5120, "llama")) and vocabulary in (32000, 32001):
        which = "13B" if width == 5120 else "7B, or LLaMA-2 if this is LLaMA-2-7B-chat"
        facts.append(
            f"fits the released MiniGPT-4 {which}: Vicuna must be v0 (v1.1 and later have the same sizes, but other "
            "weights: their answers make no sense)"
        )
    options = (LANGUAGE_MODEL,) if has_tokenizer(folder) else ()
    return Inspection(folder, f"language model ({config['model_type']})", options, facts)


def _gguf(path: Path) -> Inspection:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError("gguf", f"reading {path.name}", "mini") from error
    try:
        reader = gguf.GGUFReader(path)
        values = {name: field_.contents() for name, field_ in reader.fields.items() if "tokenizer" not in name}
    except Exception as error:  # damaged headers raise errors of any kind
        raise WeightsError(f"{path}: truncated or not a GGUF file: {error}") from error
    family = values.get("general.architecture", "unknown")
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    facts = [
        f"{path.stat().st_size / 1e9:.2f} GB, {len(reader.tensors)} tensors, mostly {kinds.most_common(1)[0][0]}",
        f"{values.get('general.name', 'no name')}: {values.get(f'{family}.block_count', '?')} layers "
        f"{values.get(f'{family}.embedding_length', '?')} wide",
    ]
    return Inspection(path, f"GGUF language model ({family})", (LANGUAGE_MODEL,), facts)


def _size(path: Path, tensors: Tensors) -> str:
    numbers = sum(tensor.numel() for tensor in tensors.values())
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    precision = ", ".join(kind for kind, _ in kinds.most_common())
    return f"{path.stat().st_size / 1e6:,.1f} MB; {len(tensors)} tensors, {numbers:,} numbers, {precision or 'nothing'}"
