"""What travels with the project: every YAML validates, every README command exists, the wheel works alone."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from minigpt4 import Chat, load_model
from minigpt4.assets import expand, is_cached, resolve
from minigpt4.cli import main
from minigpt4.config import load_config, shipped, shipped_configs
from minigpt4.datasets.easy_vqa import COLOURS, SHAPES
from minigpt4.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "dataset").glob("*.md"))]
needs_mini = pytest.mark.skipif(
    not all(is_cached(name) for name in expand("mini")), reason="python -m minigpt4 assets mini has not been run"
)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_validates(name):
    """What only the user can give may be missing, and nothing else may be wrong."""
    problems: list[str] = []
    try:
        load_config(name)
    except ConfigError as error:
        problems = error.problems
    assert all("is required" in problem and "--options" in problem for problem in problems), problems
    keys = [re.search(r"--options (\S+?)=", problem).group(1) for problem in problems]
    options = [f"{key}={'[x.tar]' if key.endswith('urls') else 'x'}" for key in keys]
    assert load_config(name, options).model is not None


def commands() -> list[str]:
    """Return every command line of the documents' shell blocks, continuation lines joined."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL):
            found += block.replace("\\\n", " ").splitlines()
    return [line.strip() for line in found if line.strip()]


@pytest.mark.parametrize("command", [c for c in commands() if "train.py" in c])
def test_training_commands_of_the_documents_name_real_options(command, monkeypatch, capsys, tmp_path):
    """Run as written, they must get as far as missing files: no unknown key, no wrong value."""
    words = shlex.split(command, comments=True)
    arguments = words[words.index("train.py") + 1 :]
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 1
    message = capsys.readouterr().err
    assert "there is no file" in message
    assert "unknown" not in message
    assert "is required" not in message


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_targets_of_the_documents_exist(command):
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in commands() if "-m minigpt4" in c or "demo.py" in c])
def test_other_commands_of_the_documents_are_understood(command):
    """Only what argparse says is asked: the verb and its flags exist."""
    words = [sys.executable, *shlex.split(command, comments=True)[1:], "--help"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(target.glob("*.whl"))


def test_the_wheel_carries_configs_prompts_and_the_mini_checkpoint(wheel):
    inside = zipfile.ZipFile(wheel).namelist()
    examples = [example.image.removeprefix("shipped:") for example in load_config("mini").demo.examples]
    assert examples
    for name in ("configs/mini_stage1.yaml", "prompts/alignment.txt", "eval_configs/mini/model.safetensors", *examples):
        assert f"minigpt4/shipped/{name}" in inside
    assert "minigpt4/demo/page.css" in inside
    assert not [name for name in inside if name.startswith(("tests/", "configs/"))]


def test_the_kept_checkpoint_is_held_in_the_precision_that_is_fast_here():
    """By its path as by its name: a checkpoint remembers the precision it was trained in."""
    for name in ("mini", str(ROOT / "eval_configs" / "mini" / "config.yaml")):
        assert load_config(name).model.language_model.config.dtype == "auto"


@needs_mini
def test_the_installed_wheel_chats_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    image = resolve("asset:easy-vqa") / "test" / "images" / "7.png"
    script = "import minigpt4, sys; from minigpt4.cli import main; print(minigpt4.__file__); sys.exit(main())"
    run = subprocess.run(
        [sys.executable, "-c", script, "chat", "--image", str(image), "--question", "what color is the shape?"],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    where, answer = run.stdout.strip().splitlines()
    assert where.startswith(str(site))
    assert answer == "green"


@needs_mini
def test_the_mini_model_answers_about_images_it_never_saw():
    """A fixed sample of test questions through the kept checkpoint; its model card has the score on all of them."""
    config = load_config("mini", ["evaluation.samples=96"])
    from minigpt4.registry import RUNNERS

    score = RUNNERS.get("evaluate").from_config(config).run()
    assert score.overall.asked == 96
    assert score.overall.value > 0.95


@needs_mini
def test_the_mini_model_is_right_about_the_examples_in_every_turn_of_a_conversation():
    """They are larger than the pictures it was trained on, and it was trained on first turns alone."""
    chat = Chat(load_model("mini", device="cpu"))
    for example in sorted((ROOT / "eval_configs" / "mini" / "examples").glob("*.png")):
        colour, shape = example.stem.split("_")
        session = chat.session(images=[example])
        assert f"{colour} {shape}" in session.ask("Describe this image in detail.")
        asked = {f"Is there a {thing} shape?": "yes" if thing == colour else "no" for thing in COLOURS}
        asked |= {f"Does the image not contain a {thing}?": "no" if thing == shape else "yes" for thing in SHAPES}
        asked |= {"What color is the shape?": colour, "What shape is in the image?": shape}
        assert {question: session.ask(question) for question in asked} == asked, example.name


def test_shipped_finds_the_checkout():
    assert shipped("prompts", "alignment.txt").read_text().count("<ImageHere>") == 4
