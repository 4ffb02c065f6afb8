"""Runs that a signal stops, that share a folder, that find their disk full, or lose a rank."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from minigpt4.errors import ConfigError, RunStoppedError, TrainingError
from minigpt4.runners.folder import own_folder
from minigpt4.runners.stopping import StopRequest
from tests.conftest import read_metrics
from tests.runners.parts import series, start_command, train, train_on_ranks, write

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def start_ranks(file: Path, number: int, output: Path, *options: str) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start_command(
            ["--cfg-path", str(file), *(["--options", *options] if options else [])],
            {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "TEST_OUTPUT": f"{output}{rank}"},
        )
        for rank in range(number)
    ]


def wait_for_step(folder: Path, step: int, ranks: Sequence[BaseProcess] = ()) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and all(rank.is_alive() for rank in ranks):
        if (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("stops", [1, pytest.param(10, marks=pytest.mark.long)])
def test_stopped_at_random_two_ranks_with_workers_are_the_same_run(tiny_values, tmp_path, stops, record_property):
    record_property("figure: one of two ranks with workers stopped by a signal, then resumed: the same losses", stops)
    run = {"total_steps": 20 * stops, "batch_size_per_rank": 2, "num_workers": 1, "save_every_steps": 0}
    whole = write(tiny_values, tmp_path / "whole", **run)
    assert train_on_ranks([whole, whole]) == [0, 0]
    file, folder = write(tiny_values, tmp_path / "stopped", **run), tmp_path / "stopped"
    generator = random.Random(1)
    for stop in range(stops):
        number = signal.SIGINT if stop % 3 == 1 else signal.SIGTERM
        before = len(read_metrics(folder)) if (folder / "metrics.jsonl").exists() else 0
        ranks = start_ranks(file, 2, tmp_path / "errors", "run.resume=true")
        wait_for_step(folder, before + 1, ranks)
        time.sleep(generator.uniform(0, 0.3))
        os.kill(ranks[stop % 2].pid or 0, number)  # one rank alone: both must stop at the same step
        for rank in ranks:
            rank.join(240)
        assert [rank.exitcode for rank in ranks] == [128 + number] * 2
        last = read_metrics(folder)[-1]["step"]
        assert (folder / "checkpoints" / "latest").resolve().name == f"step_{last}"
        assert f"stopped by {number.name} after step {last} of {20 * stops}" in (tmp_path / "errors0").read_text()
        assert "run.resume=true" in (folder / "log.txt").read_text()
    ranks = start_ranks(file, 2, tmp_path / "errors", "run.resume=true")
    for rank in ranks:
        rank.join(240)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert series(folder) == series(tmp_path / "whole")


def test_a_rank_that_is_killed_ends_the_other_with_one_message(tiny_values, tmp_path):
    file = write(tiny_values, tmp_path / "run", total_steps=2000, batch_size_per_rank=2, save_every_steps=0)
    ranks = start_ranks(file, 2, tmp_path / "errors")
    wait_for_step(tmp_path / "run", 2, ranks)
    ranks[1].kill()
    ranks[0].join(120)
    assert ranks[0].exitcode == 1
    assert "rank 1 ended or does not answer" in (tmp_path / "errors0").read_text()
    assert "rank 1 ended or does not answer" in (tmp_path / "run" / "log.txt").read_text()
    assert "Traceback" not in (tmp_path / "errors0").read_text()


@pytest.mark.long
def test_ranks_end_with_their_launcher(tiny_values, tmp_path):
    """torchrun is killed, and cannot end its ranks: they finish the step, save it, and end."""
    file = write(tiny_values, tmp_path / "run", total_steps=100_000, batch_size_per_rank=2, save_every_steps=0)
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "train.py"), "--cfg-path", str(file), "--options", "run.device=cpu"]
    with (tmp_path / "output").open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as launcher:
        wait_for_step(tmp_path / "run", 2)
        ranks = [each for each in psutil.Process(launcher.pid).children() if str(ROOT / "train.py") in each.cmdline()]
        launcher.kill()
    _, left = psutil.wait_procs(ranks, timeout=60)
    assert len(ranks) == 2
    assert not left
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert f"stopped by SIGTERM after step {last} of 100000" in (tmp_path / "run" / "log.txt").read_text()
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == f"step_{last}"


def test_a_folder_in_use_is_refused_and_the_lock_of_a_dead_process_is_not(tiny_values, tmp_path):
    with (
        own_folder(tmp_path / "run"),
        pytest.raises(ConfigError, match=f"in use by another run .process {os.getpid()}"),
    ):
        train(tiny_values, tmp_path / "run")
    process = start_command(["--cfg-path", str(write(tiny_values, tmp_path / "run", total_steps=2000))])
    wait_for_step(tmp_path / "run", 1, [process])
    with pytest.raises(ConfigError, match=f"process {process.pid} on {socket.gethostname()}"):
        train(tiny_values, tmp_path / "run")
    process.kill()
    process.join()
    train(tiny_values, tmp_path / "run", resume=True, total_steps=4)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("kilobytes", [8, 100, 130])
def test_a_full_disk_ends_with_one_message(tiny_values, tmp_path, kilobytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], check=False).returncode:
        pytest.skip("cannot mount")
    try:
        file = write(tiny_values, tmp_path / "run", output_dir=str(disk / "run"), total_steps=2000, save_every_steps=5)
        process = start_command(["--cfg-path", str(file)], {"TEST_OUTPUT": str(tmp_path / "errors")})
        process.join(90)
        text = (tmp_path / "errors").read_text()
        assert process.exitcode == 1
        assert len([line for line in text.splitlines() if line.startswith("error:")]) == 1
        assert "cannot be written" in text
        assert "Traceback" not in text
        assert not list(disk.rglob("*.partial"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_left_over_variables_of_a_launcher_are_one_message(tiny_values, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(TrainingError, match=r"WORLD_SIZE=4 is set, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are"):
        train(tiny_values, tmp_path / "run")


def test_a_run_that_saw_no_image_ends_unless_images_are_optional(tiny_values, pairs, tmp_path):
    rows = '{"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]}\n'
    image = next((pairs / "image").iterdir()).name
    (tmp_path / "rows.jsonl").write_text(rows * 1000 + f'{{"image": "{image}", "caption": "red"}}\n')
    source = {"type": "conversations", "path": str(tmp_path / "rows.jsonl"), "image_dir": str(pairs / "image")}
    source["images"] = "required"
    tiny_values["datasets"] = {"train": {"d": source}}
    tiny_values["model"]["trainable"] = ["llama_proj", "lora"]
    tiny_values["model"]["language_model"]["lora"] = {"rank": 2}
    with pytest.raises(TrainingError, match=r"16 samples had not one image; check image_dir"):
        train(tiny_values, tmp_path / "run")
    assert "16 samples had not one image" in (tmp_path / "run" / "log.txt").read_text()
    source["images"] = "optional"
    train(tiny_values, tmp_path / "texts")


def test_the_order_of_data_sets_in_the_yaml_does_not_change_the_run(tiny_values, pairs, tmp_path):
    one = dict(tiny_values["datasets"]["train"]["pairs"])
    for name, order in (("ab", "ab"), ("ba", "ba")):
        tiny_values["datasets"]["train"] = {key: {**one, "weight": 1 + (key == "a")} for key in order}
        train(tiny_values, tmp_path / name)
    assert series(tmp_path / "ab") == series(tmp_path / "ba")


def test_a_weight_that_is_not_finite_is_not_saved(tiny_values, tmp_path):
    run = {
        "learning_rate": 3.2e38,
        "adam_betas": [0.0, 0.999],
        "warmup_steps": 0,
        "weight_decay": 1.0,
        "save_every_steps": 1,
    }
    with pytest.raises(TrainingError, match=r"llama_proj\.weight.* not finite and is not saved"):
        train(tiny_values, tmp_path / "run", **run)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_signals_of_ranks_add_up_to_one():
    stop = StopRequest()
    stop.agree(3.0)
    assert stop.agreed == signal.SIGINT
    stop.agree(4097.0)
    assert stop.agreed == signal.SIGTERM
    assert RunStoppedError("", signal.SIGTERM).exit_status == 143
