"""Config files of the published code, converted to ours: `python -m minigpt4 migrate OLD.yaml`.

Input: an old file with the sections `model`, `datasets` and `run`. Output: our values, and a line for every key that
was dropped or has to be checked. The result is read by `load_config` before it is returned.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from minigpt4.config.reading import load_config
from minigpt4.config.sources import REQUIRED
from minigpt4.errors import ConfigError

_PLACEHOLDER = re.compile(r"/?(absolute/)?path/to/|https?://")
_TEMPLATES = {"###Human: {} ###Assistant: ": ("vicuna_v0", "###"), "[INST] {} [/INST] ": ("llama2", "</s>")}
_CHAT = {"max_new_tokens": 300, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.05}
"""How the published demo decoded."""
_RENAMED = {
    "model.llama_model": "model.language_model.path",
    "model.q_former_model": "model.resampler.weights",
    "model.num_query_token": "model.resampler.num_query_tokens",
    "model.image_size": "model.vision_encoder.image_size",
    "model.ckpt": "model.init_from",
    "model.max_txt_len": "conversation.max_answer_tokens",
    "run.init_lr": "run.learning_rate",
    "run.min_lr": "run.min_learning_rate",
    "run.warmup_lr": "run.warmup_start_learning_rate",
    "run.log_freq": "run.log_every_steps",
    "run.wandb_log": "tracking.wandb",
    "run.job_name": "tracking.run_name",
    **{f"run.{key}": f"run.{key}" for key in ("warmup_steps", "weight_decay", "num_workers", "seed", "output_dir")},
}
"""Old key: our key, with the same value."""
_DROPPED = {
    "there is one model class": "model.arch",
    "8-bit weights are not here; the language model is held in bfloat16": "model.low_resource model.device_8bit",
    "the image encoder is frozen": "model.drop_path_rate model.use_grad_checkpoint",
    "run.precision and model.vision_encoder.dtype are used": "model.vit_precision",
    "conversation.template defines the prompts of chat": "model.prompt",
    "the context length of the language model is used": "model.max_context_len",
    "the parts are listed one by one": "model.model_type model.vit_model",
    "the runner is `train`": "run.task",
    "linear warm-up and cosine is the only schedule": "run.lr_sched",
    "a data set is one split": "run.train_splits run.valid_splits run.test_splits",
    "use python -m minigpt4 evaluate": "run.evaluate run.batch_size_eval",
    "run.device uses the accelerator if there is one": "run.device",
    "torchrun sets it": "run.world_size run.dist_url run.dist_backend run.distributed run.gpu run.rank",
    "an old run cannot be resumed; model.init_from starts from its weights": "run.resume_ckpt_path",
}
"""Why old keys have no counterpart."""
_TO_SET = {
    "model.vision_encoder.weights": "eva_vit_g.pth, which the published code downloaded",
    "model.resampler.weights": "blip2_pretrained_flant5xxl.pth, which the published code downloaded",
    "model.language_model.path": "the folder of the language model, which was set in minigpt4/configs/models",
    "model.init_from": "the checkpoint to start from, published or ours",
    "datasets.train.laion.urls": "the shards, [/data/laion/{00000..10488}.tar]",
    "datasets.train.cc_sbu.urls": "the shards, [/data/cc_sbu/{00000..01255}.tar]",
    "datasets.train.cc_sbu_align.path": "the folder with filter_cap.json and image/",
    "run.total_steps": "the number of optimiser steps",
}
"""Our keys that an old file may leave open, and what to set them to."""


@dataclass(frozen=True)
class Migrated:
    """An old config as ours.

    Attributes:
        values: nested values, with `???` for what has to be set.
        dropped: keys of the old file that have no counterpart, and why.
        notes: what to check.
    """

    values: dict[str, Any]
    dropped: list[str]
    notes: list[str]

    def remarks(self) -> list[str]:
        """Return one line for each dropped key and each note."""
        return [*(f"dropped {each}" for each in self.dropped), *(f"note: {each}" for each in self.notes)]

    def to_yaml(self, source: str) -> str:
        """Return the text of the new file, with the remarks as comments at the top."""
        lines = [f"Migrated from {source}.", *self.remarks()]
        return "".join(f"# {line}\n" for line in lines) + OmegaConf.to_yaml(OmegaConf.create(self.values))


def migrate(path: str | Path) -> Migrated:
    """Convert a config of the published code.

    Raises:
        ConfigError: the file cannot be read, or is not a config of the published MiniGPT-4.
    """
    old = _read(Path(path))
    trains = "run.init_lr" in old or "run.max_epoch" in old
    dropped: list[str] = []
    notes: list[str] = []
    prompts = str(old.pop("model.prompt_path", ""))
    new: dict[str, Any] = {} if trains else {"compat": "published", "chat": {**_CHAT}, "model.init_from": REQUIRED}
    new |= _model(old, notes) | _conversation(old, trains and not prompts, dropped)
    if trains:
        new |= _datasets(old, prompts, dropped, notes) | _run(old, notes)
    reasons = {key: why for why, keys in _DROPPED.items() for key in keys.split()}
    for key, value in old.items():
        if not trains and key.startswith(("run.", "datasets.")):
            dropped.append(f"{key}: not used in chat")
        elif key in _RENAMED:
            new[_RENAMED[key]] = _path(value) if _RENAMED[key] in _TO_SET else value
        else:
            dropped.append(f"{key}: {reasons.get(key, 'has no counterpart')}")
    to_set = [key for key, value in new.items() if value == REQUIRED]
    notes += [f"set {key}: {_TO_SET[key]}" for key in to_set]
    values: dict[str, Any] = {}
    for key, value in new.items():
        *sections, last = key.split(".")
        reduce(lambda section, name: section.setdefault(name, {}), sections, values)[last] = value
    result = Migrated(values, sorted(dropped), notes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "migrated.yaml"
        file.write_text(result.to_yaml(str(path)), encoding="utf-8")
        load_config(file, [f"{key}={'[x]' if key.endswith('urls') else 1}" for key in to_set])
    return result


def _read(path: Path) -> dict[str, Any]:
    """Return the values of an old file as `section.key: value`, without those that are null."""
    try:
        old: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(old, dict) or not isinstance(old.get("model"), dict) or "arch" not in old["model"]:
        raise ConfigError(f"{path}: not a config of the published code, it has no model.arch")
    arch = old["model"]["arch"]
    if arch not in ("mini_gpt4", "minigpt4"):
        raise ConfigError(f"{path}: model.arch is {arch!r}, another model; expected mini_gpt4 or minigpt4")
    flat: dict[str, Any] = {}
    for name, section in old.items():
        flat |= (
            {f"{name}.{key}": item for key, item in section.items()} if isinstance(section, dict) else {name: section}
        )
    return {key: value for key, value in flat.items() if value is not None or key.startswith("datasets.")}


def _path(value: Any) -> str:
    """Return a path; `???` if there is none, or only a placeholder or a URL."""
    return REQUIRED if not value or _PLACEHOLDER.match(str(value)) else str(value)


def _model(old: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    merges = old.pop("model.has_qformer", True) is False or "llama2" in str(old.get("model.model_type"))
    frozen = {"vision_encoder": old.pop("model.freeze_vit", True), "resampler": old.pop("model.freeze_qformer", True)}
    frozen["resampler"] |= merges
    queries = {"num_query_tokens": old.pop("model.num_query_token", 32)}
    if merges:
        old.pop("model.q_former_model", None)
    if old.get("model.image_size", 224) != 224:
        notes.append("eva_vit_g.pth is for images of 224 pixels; its position embeddings fit no other size")
    return {
        "model.vision_encoder.type": "eva_vit_g",
        "model.vision_encoder.weights": REQUIRED,
        "model.vision_encoder.ln_vision_weights": "" if merges else "${model.resampler.weights}",
        "model.resampler": {"type": "merge", "neighbours": 4} if merges else {"type": "qformer", **queries},
        **({} if merges else {"model.resampler.weights": REQUIRED}),
        "model.language_model.path": REQUIRED,
        "model.language_model.dtype": "bfloat16",
        "model.trainable": ["llama_proj", *(part for part, is_frozen in frozen.items() if is_frozen is False)],
    }


def _conversation(old: dict[str, Any], is_stage_1: bool, dropped: list[str]) -> dict[str, Any]:
    prompt, end = str(old.pop("model.prompt_template", "")), str(old.pop("model.end_sym", ""))
    own = "llama2" if "llama2" in str(old.get("model.model_type")) else "vicuna_v0"
    template, expected_end = ("plain", "\n") if is_stage_1 else _TEMPLATES.get(prompt, (own, end))
    if is_stage_1 and prompt:
        dropped.append("model.prompt_template: without a prompt_path it was not used; stage 1 has no prompt")
    elif prompt and prompt not in _TEMPLATES:
        dropped.append(f"model.prompt_template: {prompt!r} is not a built-in template; {own} is used instead")
    if end not in ("", expected_end):
        dropped.append(f"model.end_sym: {end!r}; the template {template} ends answers with {expected_end!r}")
    return {"conversation.template": template, "conversation.max_answer_tokens": 32}


def _datasets(old: dict[str, Any], prompts: str, dropped: list[str], notes: list[str]) -> dict[str, Any]:
    """Convert the data sets; their smallest batch size becomes that of the run if the run has none."""
    new: dict[str, Any] = {"datasets.train": {}}
    sizes = set()
    for name in [key for key in old if key.startswith("datasets.")]:
        values, key = dict(old.pop(name) or {}), name.replace("datasets.", "datasets.train.")
        storage, text = _path((values.pop("build_info", None) or {}).get("storage")), values.pop("text_processor", None)
        if name == "datasets.cc_sbu_align":
            stem = Path(prompts).stem
            new[key] = {"type": "aligned_pairs", "prompts": stem if stem == "alignment" else prompts}
            new[f"{key}.path"] = storage
            dropped += [f"{name}.text_processor: the published code used these captions as they are"] if text else []
        elif name in ("datasets.laion", "datasets.cc_sbu"):
            new[key] = {"type": "web_pairs", "text": {"type": "blip_caption"}}
            new[f"{key}.urls"] = storage if storage == REQUIRED else [storage]
        else:
            dropped.append(f"{name}: not a data set of MiniGPT-4; the type `conversations` may fit its rows")
            continue
        new[f"{key}.weight"] = float(values.pop("sample_ratio", None) or 1)
        sizes |= {int(values.pop("batch_size"))} if "batch_size" in values else set()
        dropped += [f"{name}.{other}: has no counterpart" for other in values if other != "vis_processor"]
    batch = old.setdefault("run.batch_size_train", min(sizes, default=1))
    if len(sizes) > 1:
        notes.append(f"the data sets had different batch sizes ({sorted(sizes)}); {batch} is used for all")
    return new


def _run(old: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    steps, batch = int(old.pop("run.iters_per_epoch", 0)), int(old.pop("run.batch_size_train"))
    notes += [
        "run.global_batch_size is for one GPU: multiply it by the number of yours",
        "`compat: published` reproduces the old schedule to the step; the default is smoother",
        "gradients are clipped here: run.max_grad_norm=0 turns it off, as in the published code",
    ]
    return {
        "run.output_dir": "output",
        "run.total_steps": steps * int(old.pop("run.max_epoch", 1)) or REQUIRED,
        **({"run.steps_per_epoch": steps, "run.save_every_steps": steps} if steps else {}),
        "run.batch_size_per_rank": batch,
        "run.global_batch_size": batch * int(old.pop("run.accum_grad_iters", 1)),
        "run.precision": "fp32" if old.pop("run.amp", True) is False else "auto",
        "run.adam_betas": [0.9, float(old.pop("run.beta2", 0.999))],
    }
