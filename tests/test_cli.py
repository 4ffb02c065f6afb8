"""The command line: verbs, exit statuses, and where messages go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.cli import main
from minigpt4.registry import REGISTRIES, RUNNERS, SECTIONS

ROOT = Path(__file__).resolve().parents[1]
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
    """A folder with a config whose runner comes from a plugin, and only the sections that runner needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "probe_plugin", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(RUNNERS, "_entries", dict(RUNNERS._entries))
    own = {name: place for name, place in SECTIONS._entries.items() if name in ("run", "tracking")}
    monkeypatch.setattr(SECTIONS, "_entries", own)
    Path("probe_plugin.py").write_text(RUNNER, encoding="utf-8")
    Path("job.yaml").write_text("plugins: [probe_plugin]\nrun: {runner: probe, output_dir: done}\n", encoding="utf-8")


def test_a_job_runs_with_its_options() -> None:
    options = ["--options", "run.seed=1", "tracking.wandb=false", "--options", "run.seed=7"]
    assert main(["train", "--cfg-path", "job.yaml", *options]) == 0
    assert Path("done").read_text(encoding="utf-8") == "7"


def train(output_dir: str, *flags: str) -> int:
    return main(["train", "--cfg-path", "job.yaml", *flags, "--options", f"run.output_dir={output_dir}"])


def test_what_a_user_can_mend_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("error") == 1
    assert capsys.readouterr() == ("", "error: the loss is not finite\n")


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_the_traceback(before: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--cfg-path", "job.yaml", "--options", "run.output_dir=error"]
    assert main(["--debug", *arguments] if before else [*arguments, "--debug"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback() -> None:
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


def test_a_config_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.yaml").write_text("", encoding="utf-8")
    assert main(["train", "--cfg-path", "empty.yaml"]) == 1
    assert capsys.readouterr().err == "error: empty.yaml: section 'run' is required for this job\n"


@pytest.mark.parametrize(
    ("output_dir", "sed", "message"),
    [("error", "seed", "error on rank 3: the loss is not finite\n"), ("done", "sed", "")],
)
def test_another_rank_fails_too_and_repeats_no_config_error(
    output_dir: str, sed: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    options = [f"run.output_dir={output_dir}", f"run.{sed}=1"]
    assert main(["train", "--cfg-path", "job.yaml", "--options", *options]) == 1
    assert capsys.readouterr() == ("", message)


def test_list_shows_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for title, registry in REGISTRIES.items():
        assert f"{title}: {', '.join(registry.names())}" in lines
    assert "shipped configs:" in lines


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["train"], ["chat", "--image", "x.png"], ["assets"], ["list", "--nope"]],
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
