"""The command line: verbs, exit statuses, messages, and what is imported for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from minigpt4 import __version__
from minigpt4.cli import main
from minigpt4.registry import REGISTRIES, RUNNERS

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """\
plugins: [probe_plugin]
model:
  vision_encoder: {type: eva_vit_g, weights: random}
  resampler: {type: merge}
  language_model: {path: folder}
run: {runner: probe, output_dir: done}
"""
RUNNER = """\
import pathlib
from minigpt4.errors import TrainingError
from minigpt4.registry import RUNNERS

@RUNNERS.register("probe")
class Probe:
    def __init__(self, config):
        self.config = config

    @classmethod
    def from_config(cls, config):
        return cls(config)

    def run(self):
        name = self.config.run.output_dir
        if name == "error":
            raise TrainingError("the loss is not finite")
        if name == "defect":
            raise KeyError("a defect")
        if name == "interrupt":
            raise KeyboardInterrupt
        pathlib.Path(name).write_text(str(self.config.run.seed))
"""


@pytest.fixture(autouse=True)
def _job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a config whose runner comes from a plugin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "probe_plugin", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(RUNNERS, "_entries", dict(RUNNERS._entries))
    Path("probe_plugin.py").write_text(RUNNER, encoding="utf-8")
    Path("job.yaml").write_text(CONFIG, encoding="utf-8")


def test_a_job_runs_with_its_options() -> None:
    options = ["--options", "tracking.wandb=false", "--options", "run.seed=7"]
    assert main(["train", "--cfg-path", "job.yaml", *options]) == 0
    assert Path("done").read_text(encoding="utf-8") == "7"


def train(output_dir: str, *flags: str) -> int:
    return main(["train", "--cfg-path", "job.yaml", *flags, "--options", f"run.output_dir={output_dir}"])


def test_an_error_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("error") == 1
    assert capsys.readouterr() == ("", "error: the loss is not finite\n")


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_the_traceback(before: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--cfg-path", "job.yaml", "--options", "run.output_dir=error"]
    assert main(["--debug", *arguments] if before else [*arguments, "--debug"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError, match="a defect"):
        train("defect")


def test_ctrl_c() -> None:
    assert train("interrupt") == 130


def test_problems_of_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg-path", "job.yaml", "--options", "run.sed=1", "run.rate"]) == 1
    assert capsys.readouterr().err == (
        "error: 2 problems in the configuration:\n"
        "--options run.rate: must have the form section.key=value (null and '' are values)\n"
        "--options run.sed=1: unknown key 'run.sed'; did you mean 'seed'?\n"
    )


def test_a_config_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.yaml").write_text("", encoding="utf-8")
    assert main(["train", "--cfg-path", "empty.yaml"]) == 1
    assert capsys.readouterr().err == "error: empty.yaml: section 'model' is required\n"


@pytest.mark.parametrize(
    ("output_dir", "sed", "message"),
    [("error", "seed", "error on rank 3: the loss is not finite\n"), ("done", "sed", "")],
)
def test_other_ranks_fail_too_without_repeating_config_errors(
    output_dir: str, sed: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    options = [f"run.output_dir={output_dir}", f"run.{sed}=1"]
    assert main(["train", "--cfg-path", "job.yaml", "--options", *options]) == 1
    assert capsys.readouterr() == ("", message)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code in (None, 0)
    assert capsys.readouterr() == (f"minigpt4 {__version__}\n", "")


def test_help_explains_every_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out.partition("exit status:\n")[2]
    assert [line.split()[0] for line in shown.splitlines() if line] == ["0", "1", "2", "130"]


def test_all_bad_images_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the model, whose files do not exist, is looked for."""
    Path("words.png").write_text("words", encoding="utf-8")
    Image.new("RGB", (9, 9)).save("good.png")
    files = ["good.png", "words.png", "gone.png"]
    assert main(["chat", "--cfg-path", "job.yaml", "--image", *files, "--question", "?"]) == 1
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "error: 2 images cannot be used:"
    assert [line.partition(": ")[0] for line in others] == ["words.png", "gone.png"]
    export = ["export", "job.yaml", "--to", "prompt-embeds", "--out", "new", "--image", "gone.png"]
    assert main(export) == 1
    assert capsys.readouterr().err.startswith("error: gone.png: ")
    assert main(["caption", "--cfg-path", "job.yaml", "--images", "gone", "--out", "x.jsonl"]) == 1
    assert capsys.readouterr().err == "error: gone: folder not found; --images must be a folder\n"


def test_an_image_is_checked_against_the_limit_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (20, 20)).save("large.png")
    arguments = ["chat", "--cfg-path", "job.yaml", "--image", "large.png", "--question", "?"]
    assert main([*arguments, "--options", "processors.image.max_pixels=300"]) == 1
    assert "large.png: 20 x 20 pixels" in capsys.readouterr().err


LIGHT = [
    *(["--help"], ["--version"], ["list"], ["chta"], ["train", "--nope"], ["config", "run.seed"]),
    *(["migrate", "old.yaml"], ["migrate", "gone.yaml"], ["train", "--cfg-path", "gone"]),
    *([verb, "--options", "run.sed=1"] for verb in ("evaluate", "chat", "serve", "demo")),
    *(["train", "--cfg-path", "mini_stage1", "--options", "run.sed=1"], ["chat", "--image", "gone.png"]),
    *(
        ["caption", "--images", "gone", "--out", "x"],
        ["export", "mini", "--to", "huggingface", "--out", "x", "--options", "run.sed=1"],
    ),
    ["chat", "--cfg-path", str(ROOT / "eval_configs" / "mini"), "--options", "run.sed=1"],
    *(["plan", "gone"], ["cache", "mini_stage1", "--options", "run.sed=1"]),
]
LIGHT_AND_DONE = [
    ["inspect", str(ROOT / "eval_configs/mini")],
    ["inspect", str(ROOT / "eval_configs/mini/model.safetensors")],
]


def test_nothing_heavy_is_imported_before_arguments_and_config_are_checked() -> None:
    Path("old.yaml").write_text("model: {arch: mini_gpt4}", encoding="utf-8")
    code = f"""
import sys
from minigpt4.cli import main
for arguments in {LIGHT + LIGHT_AND_DONE!r}:
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code or 0
    heavy = [name for name in ("torch", "transformers", "timm", "accelerate", "gradio") if name in sys.modules]
    print("STATUS", status, *heavy)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    found = [line.removeprefix("STATUS ") for line in done.stdout.splitlines() if line.startswith("STATUS")]
    assert found == ["0", "0", "0", "2", "2", "0", "0", *["1"] * (len(LIGHT) - 7), *["0"] * len(LIGHT_AND_DONE)], (
        done.stderr
    )


def test_list_shows_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for title, registry in REGISTRIES.items():
        assert f"{title}: {', '.join(registry.names())}" in lines
    assert "shipped configs:" in lines


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["train"], ["caption", "--images", "x"], ["assets"], ["list", "--nope"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: minigpt4" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[str(ROOT / "train.py")], ["-m", "minigpt4", "train"]], ids=["train.py", "-m"])
def test_as_a_process(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, "--cfg-path", "gone.yaml"], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no config file 'gone.yaml'.")
    assert "Traceback" not in done.stderr
