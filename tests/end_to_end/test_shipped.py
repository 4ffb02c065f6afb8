"""What travels with the project: every YAML validates, the wheel works alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from minigpt4 import Chat, load_model
from minigpt4.assets import resolve
from minigpt4.config import load_config, shipped, shipped_configs
from minigpt4.datasets.easy_vqa import COLOURS, SHAPES
from minigpt4.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_validates(name):
    """Values that only the user can set may be missing; nothing else may be wrong."""
    problems: list[str] = []
    try:
        load_config(name)
    except ConfigError as error:
        problems = error.problems
    assert all("is required" in problem and "--options" in problem for problem in problems), problems
    keys = [re.search(r"--options (\S+?)=", problem).group(1) for problem in problems]
    options = [f"{key}={'[x.tar]' if key.endswith('urls') else 'x'}" for key in keys]
    assert load_config(name, options).model is not None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(target.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_carries_configs_prompts_and_the_mini_checkpoint(wheel):
    inside = zipfile.ZipFile(wheel).namelist()
    examples = [example.image.removeprefix("shipped:") for example in load_config("mini").demo.examples]
    assert examples
    for name in ("configs/mini_stage1.yaml", "prompts/alignment.txt", "eval_configs/mini/model.safetensors", *examples):
        assert f"minigpt4/shipped/{name}" in inside
    assert "minigpt4/demo/page.css" in inside
    assert not [name for name in inside if name.startswith(("tests/", "configs/"))]


def test_the_kept_checkpoint_is_held_in_the_precision_that_is_fast_here():
    """By its path and by its name: a checkpoint records the precision that it was trained in."""
    for name in ("mini", str(ROOT / "eval_configs" / "mini" / "config.yaml")):
        assert load_config(name).model.language_model.config.dtype == "auto"


@pytest.mark.mini
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


@pytest.mark.mini
def test_the_mini_model_answers_about_images_it_never_saw():
    """A fixed sample of test questions through the kept checkpoint; its model card has the score on all of them."""
    config = load_config("mini", ["evaluation.samples=96"])
    from minigpt4.registry import RUNNERS

    report = RUNNERS.get("evaluate").from_config(config).run()
    assert report.scores[0].questions == 96
    assert report.value("easy_vqa", "accuracy") > 0.95


@pytest.mark.long
@pytest.mark.mini
def test_the_mini_model_is_right_about_the_examples_in_every_turn_of_a_conversation():
    """They are larger than its training images, and it was trained on first turns only."""
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
