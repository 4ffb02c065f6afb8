"""Config files of the published code, rewritten as ours: `python -m minigpt4 migrate OLD.yaml`.

Input: an old file: `model` with `arch`, `datasets`, `run`. Output: our values, and a line for everything that was
dropped or has to be looked at. The result is validated by the loader before anybody sees it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from minigpt4.config.loader import load_config
from minigpt4.config.sources import REQUIRED
from minigpt4.errors import ConfigError

_PLACEHOLDER = re.compile(r"/?(absolute/)?path/to/|https?://")
_TEMPLATES = {"###Human: {} ###Assistant: ": ("vicuna_v0", "###"), "[INST] {} [/INST] ": ("llama2", "</s>")}
_PAIRS = {"laion": "{00000..10488}.tar", "cc_sbu": "{00000..01255}.tar"}
_DEMO = {"max_new_tokens": 300, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.05}
"""How the published demo decoded."""
_DROPPED_MODEL = {
    "low_resource": "8-bit weights are not here; the language model is held in bfloat16",
    "device_8bit": "8-bit weights are not here",
    "vit_precision": "run.precision and model.vision_encoder.dtype say it",
    "drop_path_rate": "the image encoder is frozen",
    "use_grad_checkpoint": "the image encoder is frozen; for the language model there is run.gradient_checkpointing",
    "prompt": "chat writes its prompts by conversation.template",
    "max_context_len": "the language model's own context is used",
    "model_type": "the parts are named one by one",
    "arch": "there is one model class",
    "vit_model": "model.vision_encoder.type says it",
    **dict.fromkeys(("freeze_vit", "freeze_qformer", "has_qformer"), ""),
}
_DROPPED_RUN = {
    "task": "the runner is `train`",
    "lr_sched": "linear warm-up and cosine is the only schedule",
    "evaluate": "python -m minigpt4 evaluate does it",
    "train_splits": "a data set is one split",
    "valid_splits": "datasets.validation names data sets",
    "test_splits": "python -m minigpt4 evaluate does it",
    "batch_size_eval": "evaluation.batch_size says it",
    "device": "run.device takes the accelerator if there is one",
    **dict.fromkeys(("world_size", "dist_url", "dist_backend", "distributed", "gpu", "rank"), "torchrun sets it"),
}
_RENAMED_RUN = {
    "init_lr": "learning_rate",
    "min_lr": "min_learning_rate",
    "warmup_lr": "warmup_start_learning_rate",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "num_workers": "num_workers",
    "seed": "seed",
    "output_dir": "output_dir",
    "log_freq": "log_every_steps",
}


@dataclass
class Migrated:
    """An old config as ours.

    Attributes:
        values: nested values, with `???` for what has to be set.
        dropped: keys of the old file that have no counterpart, and why.
        notes: what to look at.
    """

    values: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_yaml(self, source: str) -> str:
        """Return the text of the new file; its head says what was dropped."""
        lines = [
            f"Migrated from {source}.",
            *(f"dropped {d}" for d in self.dropped),
            *(f"note: {n}" for n in self.notes),
        ]
        return "".join(f"# {line}\n" for line in lines) + OmegaConf.to_yaml(OmegaConf.create(self.values))

    def put(self, key: str, value: Any) -> None:
        """Set a dotted key."""
        *path, last = key.split(".")
        at = self.values
        for name in path:
            at = at.setdefault(name, {})
        at[last] = value

    def drop(self, key: str, why: str) -> None:
        """Note that a key of the old file has no counterpart."""
        if why:
            self.dropped.append(f"{key}: {why}")

    def path(self, key: str, value: Any, what: str) -> None:
        """Set a path, or leave it open if the old file has none, or only a placeholder or an address."""
        given = str(value or "")
        if not given or _PLACEHOLDER.match(given):
            self.put(key, REQUIRED)
            self.notes.append(f"set {key}: {what}")
        else:
            self.put(key, given)


def migrate(path: str | Path) -> Migrated:
    """Rewrite a config of the published code.

    Raises:
        ConfigError: the file cannot be read, is no config of the published code, or is one of another model.
    """
    old = _read(Path(path))
    model, run = _section(old, "model"), _section(old, "run")
    trains = "init_lr" in run or "max_epoch" in run
    result = Migrated()
    if not trains:
        result.values["compat"] = "published"
    _model(result, model, trains)
    _conversation(result, model, trains)
    if trains:
        sizes = _datasets(result, _section(old, "datasets"), str(model.get("prompt_path") or ""))
        _run(result, run, sizes)
        result.notes.append("`compat: published` reproduces the old schedule to the step; the default is smoother")
        result.notes.append("gradients are clipped here: run.max_grad_norm=0 turns it off, as in the published code")
    else:
        result.values["chat"] = dict(_DEMO)
        for name in _section(old, "datasets"):
            result.drop(
                f"datasets.{name}", "the old chat read only its image processor, which the image encoder decides"
            )
        for name in run:
            result.drop(f"run.{name}", "this is a config for chat")
    for name in old.keys() - {"model", "datasets", "run"}:
        result.drop(str(name), "has no counterpart")
    _validate(result, str(path))
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        old = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(old, dict) or not isinstance(old.get("model"), dict) or "arch" not in old["model"]:
        raise ConfigError(f"{path}: is no config of the published code, it has no model.arch; ours need no migration")
    arch = str(old["model"]["arch"])
    if arch not in ("mini_gpt4", "minigpt4"):
        raise ConfigError(f"{path}: model.arch is {arch!r}, another model; only mini_gpt4 and minigpt4 can be migrated")
    return {str(name): value for name, value in old.items()}


def _section(old: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = old.get(name)
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def _model(result: Migrated, model: dict[str, Any], trains: bool) -> None:
    merges = model.get("has_qformer") is False or "llama2" in str(model.get("model_type"))
    result.put("model.vision_encoder.type", "eva_vit_g")
    result.path("model.vision_encoder.weights", None, "eva_vit_g.pth, which the published code fetched by itself")
    result.put("model.vision_encoder.ln_vision_weights", "" if merges else "${model.resampler.weights}")
    if model.get("image_size", 224) != 224:
        result.put("model.vision_encoder.image_size", model["image_size"])
        result.notes.append("eva_vit_g.pth is for images of 224 pixels; its positions do not fit another size")
    if merges:
        result.put("model.resampler", {"type": "merge", "neighbours": 4})
    else:
        result.put("model.resampler.type", "qformer")
        what = "blip2_pretrained_flant5xxl.pth, which the published code fetched by itself"
        result.path("model.resampler.weights", model.get("q_former_model"), what)
        result.put("model.resampler.num_query_tokens", model.get("num_query_token", 32))
    what = "the folder of the language model; the old one stood in minigpt4/configs/models"
    result.path("model.language_model.path", model.get("llama_model"), what)
    result.put("model.language_model.dtype", "bfloat16")
    trainable = ["llama_proj"]
    trainable += ["vision_encoder"] if model.get("freeze_vit") is False else []
    trainable += ["resampler"] if model.get("freeze_qformer") is False and not merges else []
    result.put("model.trainable", trainable)
    if "ckpt" in model:
        result.path("model.init_from", model["ckpt"], "the checkpoint to start from, published or ours")
    elif not trains:
        result.path("model.init_from", None, "the released checkpoint")
    used = {"image_size", "q_former_model", "num_query_token", "llama_model", "ckpt"}
    used |= {"prompt_path", "prompt_template", "max_txt_len", "end_sym"}
    for name in model.keys() - used:
        result.drop(f"model.{name}", _DROPPED_MODEL.get(name, "has no counterpart"))


def _conversation(result: Migrated, model: dict[str, Any], trains: bool) -> None:
    prompt, end = str(model.get("prompt_template") or ""), str(model.get("end_sym") or "")
    own = "llama2" if "llama2" in str(model.get("model_type")) else "vicuna_v0"
    if trains and not model.get("prompt_path"):
        template, wanted = "plain", "\n"
        if prompt:
            result.drop("model.prompt_template", "without a prompt_path it was not used: stage 1 has no prompt")
    elif prompt in _TEMPLATES or not prompt:
        template, wanted = _TEMPLATES.get(prompt, (own, end))
    else:
        template, wanted = own, end
        result.drop("model.prompt_template", f"{prompt!r} is none of the built-in templates; {own} is put in its place")
    if end not in ("", wanted):
        result.drop("model.end_sym", f"{end!r}; the template {template} ends answers with {wanted!r}")
    result.put("conversation.template", template)
    result.put("conversation.max_answer_tokens", model.get("max_txt_len", 32))


def _datasets(result: Migrated, datasets: dict[str, Any], prompt_path: str) -> set[int]:
    """Write the data sets; return the batch sizes they had."""
    sizes = set()
    result.put("datasets.train", {})
    for name, given in datasets.items():
        old = given if isinstance(given, dict) else {}
        info = old.get("build_info")
        storage = info.get("storage") if isinstance(info, dict) else None
        key = f"datasets.train.{name}"
        if name in _PAIRS:
            result.put(key, {"type": "web_pairs", "weight": float(old.get("sample_ratio") or 1)})
            result.path(f"{key}.urls", storage, f"the shards, [/data/{name}/{_PAIRS[name]}]")
            if result.values["datasets"]["train"][name]["urls"] != REQUIRED:
                result.put(f"{key}.urls", [str(storage)])
            result.put(f"{key}.text", {"type": "blip_caption"})
        elif name == "cc_sbu_align":
            result.put(key, {"type": "aligned_pairs", "weight": float(old.get("sample_ratio") or 1)})
            result.path(f"{key}.path", storage, "the folder with filter_cap.json and image/")
            result.put(f"{key}.prompts", "alignment" if Path(prompt_path).stem == "alignment" else prompt_path)
            if "text_processor" in old:
                result.drop(f"datasets.{name}.text_processor", "the published code used these captions as they are")
        else:
            result.drop(f"datasets.{name}", "is none of MiniGPT-4's; its rows may fit the type `conversations`")
            continue
        if "batch_size" in old:
            sizes.add(int(old["batch_size"]))
        for other in old.keys() - {"batch_size", "sample_ratio", "build_info", "text_processor", "vis_processor"}:
            result.drop(f"datasets.{name}.{other}", "has no counterpart")
    return sizes


def _run(result: Migrated, run: dict[str, Any], sizes: set[int]) -> None:
    result.put("run.output_dir", str(run.get("output_dir") or "output"))
    for old, ours in _RENAMED_RUN.items():
        if old in run:
            result.put(f"run.{ours}", float(run[old]) if "lr" in old or old == "weight_decay" else run[old])
    steps = int(run.get("iters_per_epoch") or 0)
    result.put("run.total_steps", steps * int(run.get("max_epoch") or 1) or REQUIRED)
    if steps:
        result.put("run.steps_per_epoch", steps)
        result.put("run.save_every_steps", steps)
    batch = int(run.get("batch_size_train") or min(sizes, default=1))
    if len(sizes) > 1:
        result.notes.append(f"the data sets had batch sizes of their own ({sorted(sizes)}); {batch} is taken for all")
    result.put("run.batch_size_per_rank", batch)
    result.put("run.global_batch_size", batch * int(run.get("accum_grad_iters") or 1))
    result.notes.append("run.global_batch_size is for one GPU: multiply it by the number of yours")
    if run.get("amp") is False:
        result.put("run.precision", "fp32")
    if "beta2" in run:
        result.put("run.adam_betas", [0.9, float(run["beta2"])])
    if run.get("wandb_log"):
        result.put("tracking.wandb", True)
    if run.get("job_name"):
        result.put("tracking.run_name", str(run["job_name"]))
    if run.get("resume_ckpt_path"):
        why = "an old run cannot be resumed; to start from its weights, pass it as model.init_from"
        result.drop("run.resume_ckpt_path", why)
    used = {*_RENAMED_RUN, "max_epoch", "iters_per_epoch", "batch_size_train", "accum_grad_iters", "amp", "beta2"}
    used |= {"wandb_log", "job_name", "resume_ckpt_path"}
    for name in run.keys() - used:
        result.drop(f"run.{name}", _DROPPED_RUN.get(name, "has no counterpart"))


def _validate(result: Migrated, source: str) -> None:
    """Load what was written, with something in place of what is open; raise ConfigError if the loader refuses it."""
    result.dropped.sort()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "migrated.yaml"
        file.write_text(result.to_yaml(source), encoding="utf-8")
        load_config(file, [f"{key}={_filler(key)}" for key in _open_keys(result.values)])


def _filler(key: str) -> str:
    """Return a value that the loader takes for a key that is open."""
    return "[shard.tar]" if key.endswith("urls") else "1" if key.startswith("run.") else "file"


def _open_keys(values: Mapping[str, Any], at: str = "") -> list[str]:
    keys = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            keys += _open_keys(value, f"{at}{name}.")
        elif value == REQUIRED:
            keys.append(f"{at}{name}")
    return keys
