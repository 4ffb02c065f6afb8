"""`data validate` and `data preview`: every fault of a data set is found, with its place, and the page shows it."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageFilter

from minigpt4.cli import main
from minigpt4.config.sections import ConversationConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.preparation.data_sets import set_of_path
from minigpt4.preparation.duplicates import Repeats
from minigpt4.preparation.pack import PackSettings, pack
from minigpt4.preparation.text_checks import language, repeated_sentence
from minigpt4.preparation.token_checks import TokenChecks, tokens_per_image
from minigpt4.preparation.validate import Limits, SetReport, Validation
from tests.datasets.parts import encoder
from tests.preparation.parts import write_images, write_table


def photo(seed: int) -> Image.Image:
    """A picture with edges that differs from those of other seeds."""
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((160, 120), Image.Resampling.NEAREST)


def saved(image: Image.Image, file: Path, **options: Any) -> str:
    image.save(file, **options)
    return file.name


def report_of(path: Path, tokens: TokenChecks | None = None, **limits: Any) -> SetReport:
    return Validation(set_of_path(path), Limits(**limits), tokens).run()


def first(report: SetReport, cause: str) -> str:
    (message,) = [text for (_, found), texts in report.findings.first.items() if found == cause for text in texts[:1]]
    return message


def test_every_kind_of_fault_is_found(tmp_path: Path) -> None:
    good = [saved(photo(n), tmp_path / f"{n}.png") for n in range(12)]
    buffer = io.BytesIO()
    photo(50).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:1200])
    shutil.copy(tmp_path / good[1], tmp_path / "copied.png")
    sentence = "The wall is white. "
    rows: list[Any] = [
        *({"image": name, "caption": f"A picture with the number {n}."} for n, name in enumerate(good)),
        {"image": saved(Image.new("RGB", (50, 50), "white"), tmp_path / "blank.png"), "caption": "nothing"},
        {"image": saved(photo(31).point(lambda v: v // 10), tmp_path / "dark.png"), "caption": "night"},
        {"image": saved(photo(32).filter(ImageFilter.GaussianBlur(9)), tmp_path / "soft.png"), "caption": "soft"},
        {"image": saved(photo(33).resize((300, 40)), tmp_path / "thin.png"), "caption": "thin"},
        {"image": saved(photo(34).resize((20, 20)), tmp_path / "tiny.png"), "caption": "tiny"},
        {"image": "copied.png", "caption": "the same file"},
        {"image": saved(photo(2), tmp_path / "near.jpg", quality=70), "caption": "nearly the same"},
        {"image": good[0], "caption": "A picture with the number 0."},
        *({"image": name, "caption": "common"} for name in good[:5]),
        {"image": good[3], "caption": sentence * 4, "licence": "free"},
        {"image": "cut.jpg", "caption": "damaged"},
        {"image": "cut.jpg", "caption": "damaged again"},
        {"image": "none.jpg", "caption": "missing"},
        {"image": good[4], "caption": " "},
        {"image": good[5], "conversations": [{"from": "human", "value": "<image><image> What?"}]},
    ]
    report = report_of(write_table(tmp_path / "rows.jsonl", rows))
    findings = report.findings
    assert findings.errors == {"image": 2, "missing image": 1, "caption": 1, "conversation": 1}
    assert report.rows == len(rows)
    assert report.usable == len(rows) - 5
    line = next(n for n, row in enumerate(rows, start=1) if row["image"] == "cut.jpg")
    assert f"rows.jsonl:{line}: {tmp_path / 'cut.jpg'}: the image" in first(report, "image")
    assert f"rows.jsonl:{line + 2}: image" in first(report, "missing image")
    warnings = dict(findings.warnings)
    for cause, name in {
        "blank image": "blank.png", "dark image": "dark.png", "blurred image": "soft.png", "thin image": "thin.png",
        "tiny image": "tiny.png", "copied image": "copied.png", "near copy": "near.jpg", "unread key": "'licence'",
        "repeated row": "lines 1, 20 are equal", "common answer": "5 rows have one answer: lines 21, 22, 23, 24, 25",
        "repetition": "the wall is white.",
    }.items():  # fmt: skip
        assert warnings.pop(cause) == 1, cause
        assert name in first(report, cause)
    assert warnings == {}
    assert report.pictures.used_again == 8
    assert report.lengths.total() == report.turns.total() == report.usable


def test_a_good_set_has_no_finding(tmp_path: Path) -> None:
    rows = [{"image": saved(photo(n), tmp_path / f"{n}.png"), "caption": f"picture {n}"} for n in range(5)]
    for suffix in ("json", "jsonl", "csv", "parquet"):
        report = report_of(write_table(tmp_path / f"rows.{suffix}", rows))
        assert (report.usable, report.findings.errors, report.findings.warnings) == (5, {}, {}), suffix
    pack(tmp_path / "rows.csv", tmp_path / "shards", PackSettings(samples_per_shard=2))
    report = report_of(tmp_path / "shards")
    assert (report.kind, report.usable, report.findings.errors, report.findings.warnings) == ("web_pairs", 5, {}, {})


def test_shards_are_compared_with_their_index(tmp_path: Path) -> None:
    pack(write_table(tmp_path / "rows.csv", write_images(tmp_path, 4)), tmp_path / "out", PackSettings())
    shard = tmp_path / "out" / "00000.tar"
    content = bytearray(shard.read_bytes())
    content[-1] = 1  # behind the end of the archive: nothing of a sample is damaged
    shard.write_bytes(content)
    report = report_of(tmp_path / "out")
    assert report.findings.errors["index"] == 1
    assert "00000.tar: has another checksum" in first(report, "index")


def test_annotations_alone_have_the_same_errors(tmp_path: Path) -> None:
    """The short way of plain rows finds what the long one finds, images left aside."""
    good = write_images(tmp_path, 3)
    bad: list[Any] = [
        {"image": "no.png", "caption": "x"}, {"image": good[0]["image"], "caption": "\t"}, {"caption": 3}, [], None,
        {"image": good[0]["image"], "caption": "half \ud83d"}, {"image": "nul\0.png", "caption": "x"},
        {"image": good[0]["image"], "caption": "x" * 100_001}, {"image": ["no.png"], "caption": "x"},
        {"image": good[0]["image"], "caption": "x", "id": "1"}, {"picture": good[0]["image"], "caption": "x"},
    ]  # fmt: skip
    file = write_table(tmp_path / "rows.jsonl", [*good, *bad])
    short, long = report_of(file, max_images=0), report_of(file)
    assert short.findings.errors == long.findings.errors
    assert {key: text for key, text in long.findings.first.items() if key[0] == "error"}.items() <= (
        short.findings.first.items()
    )
    assert short.usable == long.usable == 5
    assert short.lengths == long.lengths
    assert short.pictures.opened == 0


def test_every_bad_line_of_a_file_is_listed(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"caption": "a"}\n{"caption"\n\n{"caption": "b"}\nnot json\n')
    report = report_of(tmp_path / "rows.jsonl")
    assert report.findings.errors == {"row": 2}
    assert [text[-60:].partition("rows.jsonl:")[2][0] for text in report.findings.first["error", "row"]] == ["2", "5"]


def token_checks(**settings: Any) -> TokenChecks:
    return TokenChecks(encoder(template="vicuna_v0", **settings))


def test_tokens_are_those_of_training(tmp_path: Path) -> None:
    rows = [{"image": saved(photo(0), tmp_path / "0.png"), "caption": "word " * n} for n in (1, 5, 40, 150)]
    file = write_table(tmp_path / "rows.jsonl", rows)
    for limits in ({}, {"max_images": 0}):
        report = report_of(file, token_checks(max_answer_tokens=30, max_tokens=200), **limits)
        assert report.tokens.altered == {"answer cut to max_answer_tokens": 2}, limits
        assert max(report.tokens.answers) == 30
        assert report.tokens.count == 4
    report = report_of(file, token_checks(max_answer_tokens=500, max_tokens=300), max_images=0)
    assert report.findings.errors == {"too long": 1}


def test_the_supervised_part_is_marked() -> None:
    checks = token_checks()
    dialogue = Dialogue((Turn("<ImageHere> What is this?", "A  red\ncat."), Turn("Sure?", "Yes.")))
    parts = checks.parts(dialogue, 1, "sample")
    shown = "".join(part.text for part in parts if part.kind != "image")
    assert shown == (  # the blanks that the separately tokenised pieces have
        "<s> ###Human: <Img></Img> What is this? ###Assistant:  A  red\ncat.### Human: Sure? ###Assistant:  Yes.###"
    )
    assert [part.text.strip() for part in parts if part.kind == "trained"] == ["A  red\ncat.###", "Yes.###"]
    assert [part.tokens for part in parts if part.kind == "image"] == [4]
    assert sum(part.tokens for part in parts) == len(checks.encoder.encode_dialogue(
        dialogue, num_images=1, sample_id="x").input_ids)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat is sitting on the sofa and looks at a ball.", "English"),
        ("Die Katze sitzt auf dem Sofa und ist nicht allein.", "German"),
        ("Le chat est assis sur le canapé avec une balle.", "French"),
        ("El gato está en el sofá con una pelota.", "Spanish"),
        ("Кошка сидит на диване.", "Cyrillic"),
        ("一只猫坐在沙发上", "Chinese or Japanese"),
        ("ok", "unknown"),
        ("123 !", "no letters"),
        ("", "no letters"),
    ],
)
def test_languages_are_guessed(text: str, expected: str) -> None:
    assert language(text) == expected


def test_repeated_sentences() -> None:
    assert repeated_sentence("A dog. A dog. A cat sits there. A dog.") == "a dog."
    assert repeated_sentence("A dog. A cat. A dog. The dog is here.") == ""


def test_repeats_are_found_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt4.preparation.duplicates.AT_ONCE", 50)
    repeats = Repeats()
    for number in range(1, 401):
        repeats.add(number, f"value {number % 300}")
    groups = sorted(repeats.groups())
    assert groups == [[number, number + 300] for number in range(1, 101)]
    repeats.close()


def test_tokens_per_image_come_from_the_settings(tiny_values: dict[str, Any]) -> None:
    from minigpt4.checkpoints.assemble import assemble
    from minigpt4.config import config_from_values

    config = config_from_values(tiny_values, "tiny")
    assert tokens_per_image(config) == assemble(config).model.num_query_tokens == 4


def test_a_config_is_checked_with_its_own_tokenizer(
    tmp_path: Path, tiny_values: dict[str, Any], pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_values["datasets"]["validation"] = {"gone": {"type": "conversations", "path": str(tmp_path / "none.json")}}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_values))
    page, problems = tmp_path / "report.html", tmp_path / "problems.jsonl"
    command = ["data", "validate", str(config), "--report", str(page), "--problems", str(problems)]
    assert main(command) == 1
    shown = capsys.readouterr()
    assert "pairs (aligned_pairs): 12 rows, 12 usable" in shown.out
    assert re.search(r"tokens: \d+ to \d+ per row", shown.out)
    assert "none.json" in shown.out
    assert "1 errors in the data" in shown.err
    lines = [json.loads(line) for line in problems.read_text().splitlines()]
    assert [line["cause"] for line in lines if line["level"] == "error"] == ["missing"]
    html = page.read_text()
    assert html.count("<mark") == 6
    assert "Training would not start with this data set" in html
    del tiny_values["datasets"]["validation"]
    config.write_text(yaml.safe_dump(tiny_values))
    assert main(command) == 0


def test_preview_shows_images_and_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_images(tmp_path, 9)
    file = write_table(tmp_path / "rows.jsonl", [*rows, {"image": "no.png", "caption": "x"}])
    assert main(["data", "preview", str(file), "--out", str(tmp_path / "sheet.html"), "--count", "7"]) == 0
    html = (tmp_path / "sheet.html").read_text()
    assert html.count("<img") == 7
    assert "caption 1, &quot;quoted&quot;" in html or "caption 2, &quot;quoted&quot;" in html


def test_what_is_no_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.xyz").touch()
    for target, words in {
        str(tmp_path / "data.xyz"): "not data that is known",
        str(tmp_path / "none.jsonl"): "neither a config nor a file or folder",
        "no_such_config": "no config file 'no_such_config'",
    }.items():
        assert main(["data", "validate", target, "--report", str(tmp_path / "r.html")]) == 1
        assert words in capsys.readouterr().err
    assert ConversationConfig().max_answer_tokens == 160
