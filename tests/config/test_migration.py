"""Configs of the published code are converted: every key is mapped, or listed with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt4.cli import main
from minigpt4.config import load_config, migrate
from minigpt4.errors import ConfigError

PROCESSORS = {
    "vis_processor": {"train": {"name": "blip2_image_train", "image_size": 224}},
    "text_processor": {"train": {"name": "blip_caption"}},
}
LAUNCH = {
    "task": "image_text_pretrain",
    "evaluate": False,
    "train_splits": ["train"],
    "device": "cuda",
    "world_size": 1,
    "dist_url": "env://",
    "distributed": True,
}
RATES = {"lr_sched": "linear_warmup_cosine_lr", "warmup_lr": 1e-6, "weight_decay": 0.05, "num_workers": 4, "seed": 42}
STAGE_1 = {
    "model": {"arch": "mini_gpt4", "model_type": "pretrain_vicuna0"},
    "datasets": {
        "laion": {
            "batch_size": 64,
            "sample_ratio": 115,
            "build_info": {"storage": "/data/laion/{00000..00009}.tar"},
            **PROCESSORS,
        },
        "cc_sbu": {"batch_size": 64, "sample_ratio": 14, **PROCESSORS},
    },
    "run": {
        **LAUNCH,
        **RATES,
        "init_lr": 1e-4,
        "min_lr": 8e-5,
        "max_epoch": 4,
        "iters_per_epoch": 5000,
        "warmup_steps": 5000,
        "output_dir": "output/stage1",
        "amp": True,
        "resume_ckpt_path": None,
        "wandb_log": True,
        "job_name": "pretrain",
    },
}
STAGE_2 = {
    "model": {
        "arch": "minigpt4",
        "model_type": "pretrain_llama2",
        "max_txt_len": 160,
        "end_sym": "</s>",
        "prompt_path": "prompts/alignment.txt",
        "prompt_template": "[INST] {} [/INST] ",
        "llama_model": "/models/llama2",
        "ckpt": "/models/stage1.pth",
        "low_resource": True,
    },
    "datasets": {"cc_sbu_align": {**PROCESSORS, "build_info": {"storage": "/data/cc_sbu_align/"}}},
    "run": {
        **LAUNCH,
        **RATES,
        "init_lr": 3e-5,
        "min_lr": 1e-5,
        "max_epoch": 5,
        "iters_per_epoch": 200,
        "warmup_steps": 200,
        "batch_size_train": 12,
        "batch_size_eval": 12,
        "output_dir": "output/stage2",
        "amp": False,
        "resume_ckpt_path": "output/old/checkpoint_3.pth",
    },
}
EVAL = {
    "model": {
        "arch": "mini_gpt4",
        "model_type": "pretrain_vicuna",
        "freeze_vit": True,
        "freeze_qformer": True,
        "max_txt_len": 160,
        "end_sym": "###",
        "low_resource": True,
        "prompt_path": "prompts/alignment.txt",
        "prompt_template": "###Human: {} ###Assistant: ",
        "ckpt": "/path/to/checkpoint/",
        "llama_model": "/models/vicuna-7b",
    },
    "datasets": {"cc_sbu_align": PROCESSORS},
    "run": {"task": "image_text_pretrain"},
}


def rewritten(old: dict[str, Any], folder: Path, *options: str) -> Any:
    """Migrate through the command line, load what was written, and return the config."""
    (folder / "old.yaml").write_text(yaml.safe_dump(old))
    assert main(["migrate", str(folder / "old.yaml"), "--out", str(folder / "new.yaml")]) == 0
    return load_config(folder / "new.yaml", options)


def test_stage_1(tmp_path, capsys):
    given = ("model.vision_encoder.weights=e", "model.resampler.weights=q", "model.language_model.path=l")
    config = rewritten(STAGE_1, tmp_path, *given, "datasets.train.cc_sbu.urls=[x.tar]")
    assert (config.conversation.template, config.conversation.max_answer_tokens) == ("plain", 32)
    assert config.model.vision_encoder.config.ln_vision_weights == "q"
    assert config.datasets.train["laion"].config.urls == ["/data/laion/{00000..00009}.tar"]
    weights = {name: part.config.weight for name, part in config.datasets.train.items()}
    assert weights == {"laion": 115, "cc_sbu": 14}
    assert {part.config.text.type for part in config.datasets.train.values()} == {"blip_caption"}
    run = config.run
    assert (run.total_steps, run.steps_per_epoch, run.warmup_steps) == (20000, 5000, 5000)
    assert (run.learning_rate, run.min_learning_rate, run.warmup_start_learning_rate) == (1e-4, 8e-5, 1e-6)
    assert (run.batch_size_per_rank, run.global_batch_size, run.num_workers) == (64, 64, 4)
    assert (run.output_dir, run.precision) == ("output/stage1", "auto")
    assert (config.tracking.wandb, config.tracking.run_name) == (True, "pretrain")
    shown = capsys.readouterr().err
    for key in ("dist_url: torchrun sets it", "task: the runner", "lr_sched: linear warm-up", "device: run.device"):
        assert f"dropped run.{key}" in shown
    assert "note: set datasets.train.cc_sbu.urls: the shards" in shown
    assert "note: run.global_batch_size is for one GPU" in shown
    assert "# dropped run.dist_url" in (tmp_path / "new.yaml").read_text()


def test_stage_2_of_the_llama2_variant(tmp_path, capsys):
    config = rewritten(STAGE_2, tmp_path, "model.vision_encoder.weights=e")
    assert config.model.resampler.type == "merge"
    assert config.model.vision_encoder.config.ln_vision_weights == ""
    assert (config.model.language_model.config.path, config.model.init_from) == ("/models/llama2", "/models/stage1.pth")
    assert (config.conversation.template, config.conversation.max_answer_tokens) == ("llama2", 160)
    align = config.datasets.train["cc_sbu_align"]
    assert (align.config.path, align.config.prompts, align.config.text.type) == (
        "/data/cc_sbu_align/",
        "alignment",
        "text",
    )
    assert (config.run.total_steps, config.run.batch_size_per_rank, config.run.precision) == (1000, 12, "fp32")
    shown = capsys.readouterr().err
    assert "dropped run.resume_ckpt_path: an old run cannot be resumed" in shown
    assert "dropped model.low_resource: 8-bit weights are not here" in shown
    assert "text_processor: the published code used these captions as they are" in shown


def test_chat_keeps_the_published_quirks(tmp_path, capsys):
    given = ("model.vision_encoder.weights=e", "model.resampler.weights=q", "model.init_from=c")
    config = rewritten(EVAL, tmp_path, *given)
    assert (config.compat, config.conversation.template) == ("published", "vicuna_v0")
    assert (config.chat.temperature, config.chat.top_p, config.chat.repetition_penalty) == (1.0, 0.9, 1.05)
    assert config.run.total_steps == 0
    assert "note: set model.init_from" in capsys.readouterr().err


def change(old: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return {name: {**values, **sections.get(name, {})} for name, values in old.items()}


@pytest.mark.parametrize("old", [STAGE_1, STAGE_2, EVAL], ids=["stage 1", "stage 2", "chat"])
def test_every_unknown_key_is_reported(old, tmp_path):
    """An unknown key is listed, wherever it is; a converted key is not."""
    strange = change(old, model={"lora_r": 64}, run={"strange": 1}, datasets={"coco_vqa": {"batch_size": 6}}) | {
        "other": 1
    }
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(strange))
    dropped = migrate(tmp_path / "old.yaml").dropped
    names = {line.split(": ")[0] for line in dropped}
    assert {"model.lora_r", "run.strange", "datasets.coco_vqa", "other"} <= names
    assert all(": " in line for line in dropped)
    assert not names & {"model.ckpt", "model.max_txt_len", "run.init_lr"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"prompt_template": "USER: {} ASSISTANT:"},
            "dropped model.prompt_template: 'USER: {} ASSISTANT:' is not a built-in",
        ),
        ({"end_sym": "@@"}, "dropped model.end_sym: '@@'; the template llama2 ends answers with '</s>'"),
        ({"image_size": 448}, "note: eva_vit_g.pth is for images of 224 pixels"),
        ({"prompt_path": "", "end_sym": "\n"}, "dropped model.prompt_template: without a prompt_path it was not used"),
    ],
    ids=["template", "end mark", "image size", "no prompts"],
)
def test_differences_are_reported(model, message, tmp_path, capsys):
    rewritten(change(STAGE_2, model=model), tmp_path, "model.vision_encoder.weights=e")
    assert message in capsys.readouterr().err


def test_parts_that_were_not_frozen_are_trained(tmp_path):
    old = change(STAGE_1, model={"freeze_vit": False, "freeze_qformer": False})
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    assert migrate(tmp_path / "old.yaml").values["model"]["trainable"] == ["llama_proj", "vision_encoder", "resampler"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {arch: minigpt_v2}", "model.arch is 'minigpt_v2', another model"),
        ("model: {type: minigpt4}", "not a config of the published code, it has no model.arch"),
        ("model: [", "cannot be read as YAML"),
        ("- 1", "not a config of the published code"),
    ],
)
def test_other_files_are_rejected(text, message, tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(text)
    assert main(["migrate", str(tmp_path / "old.yaml")]) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot be read"):
        migrate(tmp_path / "gone.yaml")


def test_without_a_file_the_new_config_goes_to_standard_output(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(EVAL))
    assert main(["migrate", str(tmp_path / "old.yaml")]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["language_model"]["path"] == "/models/vicuna-7b"
    assert main(["migrate", str(tmp_path / "old.yaml"), "--out", str(tmp_path / "no" / "new.yaml")]) == 1
    assert "cannot be written" in capsys.readouterr().err
