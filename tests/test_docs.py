"""The documentation is true: commands, configs, Python blocks, paths and links are valid, and the site builds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from minigpt4 import Chat
from minigpt4.checkpoints.assemble import assemble
from minigpt4.cli.parser import build_parser
from minigpt4.config import config_from_values, load_config, shipped_configs
from minigpt4.registry import VISION_ENCODERS

ROOT = Path(__file__).parents[1]
FILES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "eval_configs/mini/README.md")
    ),
    *sorted((ROOT / "dataset").glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in FILES}
FOLDERS = r"\.ci|benchmarks|configs|dataset|docs|eval_configs|minigpt4|notebooks|prompts|tests"
SHIPPED = {name for file in shipped_configs() for name in (file, Path(file).stem)}


def blocks(language: str) -> list[tuple[str, str]]:
    """Return (page, block) for every fenced block of a language."""
    fence = re.compile(rf"^( *)```{language}\n(.*?)^\1```", flags=re.DOTALL | re.MULTILINE)
    return [(name, textwrap.dedent(found[1])) for name, text in PAGES.items() for found in fence.findall(text)]


def commands() -> list[list[str]]:
    """Return the words of every command line in the shell blocks, without comments."""
    lines = [line for _, block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def our_arguments() -> list[list[str]]:
    """Return what the command lines pass to `python -m minigpt4`, `train.py` and `demo.py`."""
    found = []
    for words in commands():
        for start, verb in (("minigpt4", []), ("train.py", ["train"]), ("demo.py", ["demo"])):
            if words[0] in ("python", "torchrun") and start in words and "FORMAT" not in words:
                found.append([*verb, *words[words.index(start) + 1 :]])
    return found


def verbs() -> list[str]:
    """Return the verbs of the command line."""
    return sorted(re.findall(r"^    (\w+)(?: |$)", build_parser().format_help(), flags=re.MULTILINE))


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    """The package that docs/own_parts.md writes."""
    (code,) = (block for _, block in blocks("python") if block.startswith("# my_package/__init__.py"))
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_package", None)
    VISION_ENCODERS._entries.pop("patches", None)


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize(("page", "block"), blocks("yaml"))
def test_every_yaml_is_a_valid_config(page, block, tmp_path, my_package):
    file = tmp_path / "page.yaml"
    file.write_text(block.replace("extends: ", f"extends: {ROOT}/eval_configs/"))
    config = load_config(file)
    assert config.model is not None


def test_the_class_of_the_page_is_a_part(my_package, tiny_llm):
    """Built from the page's own YAML, with a language model that is here."""
    (block,) = (block for _, block in blocks("yaml") if "plugins:" in block)
    values = yaml.safe_load(block)
    values["model"]["language_model"] = {"path": str(tiny_llm), "dtype": "float32"}
    values |= {"conversation": {"template": "vicuna_v0"}, "chat": {"max_new_tokens": 3}}
    loaded = assemble(config_from_values(values, "page"))
    assert loaded.model.vision_encoder.feature_dim == 48
    image = b"P6 2 2 255 " + bytes(range(12))
    assert isinstance(Chat(loaded).session(images=[image]).ask("What is it?"), str)


@pytest.mark.parametrize(("page", "block"), blocks("python"))
def test_every_python_block_compiles(page, block):
    compile(block, page, "exec")


@pytest.mark.mini
def test_the_python_block_of_the_readme_runs(capsys, monkeypatch):
    (block,) = (block for page, block in blocks("python") if page == "README.md")
    monkeypatch.chdir(ROOT)
    exec(block, {})
    assert capsys.readouterr().out == "red\n"


@pytest.mark.parametrize("arguments", our_arguments(), ids=" ".join)
def test_every_command_of_ours_is_understood(arguments):
    """Verb, flags and options exist; for a shipped config the options have valid values and nothing is missing."""
    understood = vars(build_parser().parse_args(arguments))
    if understood.get("cfg_path") in SHIPPED:
        plans = arguments[0] == "plan"  # whose other paths may stay open
        load_config(understood["cfg_path"], understood.get("options", []), paths_required=not plans)


def test_make_targets_and_scripts_exist():
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {words[1] for words in commands() if words[0] == "make"}
    assert targets
    assert [name for name in targets if not re.search(rf"^{name}:", rules, flags=re.MULTILINE)] == []
    scripts = [words[1] for words in commands() if words[0] == "python" and words[1].endswith(".py")]
    assert [name for name in scripts if not (ROOT / name).is_file()] == ["minigpt4-hf/example.py"]  # of an export


@pytest.mark.parametrize("page", ["README.md", "docs/commands.md"])
def test_the_tables_of_commands_name_every_verb_and_no_other_flag(page, capsys):
    table = PAGES[page].partition("## Commands" if page == "README.md" else "# Commands")[2].partition("\n## ")[0]
    shown = [cell for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for cell in row.split(", ")]
    usages = {usage.strip("`").split()[0]: usage for usage in shown if not usage.startswith("`python")}
    assert sorted(usages) == verbs()
    for verb, usage in usages.items():
        with pytest.raises(SystemExit):
            build_parser().parse_args([verb, "--help"])
        known = capsys.readouterr().out
        assert [flag for flag in re.findall(r"--[\w-]+", usage) if flag not in known] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    text = re.sub(r"^ *```.*?^ *```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (ROOT / page).parent.joinpath(link).exists()] == []
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text) if page != "CHANGELOG.md" else []
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))  # and the page for what is not found
    for page in pages:
        assert re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//[^"]*', page.read_text("utf-8")) == []
