"""`data pack`: every format gives the same pairs, equal input equal bytes, and a killed job continues."""

from __future__ import annotations

import json
import logging
import multiprocessing
import random
import signal
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minigpt4.cli import main
from minigpt4.datasets.shard_index import differences, read_index
from minigpt4.datasets.source import Example
from minigpt4.errors import DataError
from minigpt4.preparation.pack import PackSettings, pack
from minigpt4.preparation.pairs import Keys, TablePairs
from tests.datasets.parts import image_bytes, web_pairs
from tests.preparation.parts import FORMATS, captions, content, write_images, write_table

SMALL = PackSettings(samples_per_shard=4)


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return write_images(tmp_path, 10)


def test_every_format_gives_the_same_shards(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    packed = {}
    for suffix in FORMATS:
        file = write_table(tmp_path / f"rows.{suffix}", rows)
        index = pack(file, tmp_path / suffix, SMALL)
        assert [shard.samples for shard in index.shards] == [4, 4, 2]
        assert captions(tmp_path / suffix) == [row["caption"] for row in rows]
        files = content(tmp_path / suffix)
        assert sorted(files) == ["00000.tar", "00001.tar", "00002.tar", "index.json"]
        packed[suffix] = files
    again = pack(tmp_path / "rows.csv", tmp_path / "again", SMALL)
    assert content(tmp_path / "again") == packed["csv"]
    assert differences([str(tmp_path / "again" / shard.file) for shard in again.shards], whole=True) == []
    assert read_index(tmp_path / "again") == again


def test_image_files_are_packed_as_they_are(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    pack(write_table(tmp_path / "rows.jsonl", rows), tmp_path / "out", PackSettings())
    for item, row in zip(web_pairs([str(tmp_path / "out" / "00000.tar")]).in_order(), rows, strict=True):
        assert isinstance(item, Example)
        assert item.images[0] == (tmp_path / row["image"]).read_bytes()


def test_a_folder_of_images_and_captions(tmp_path: Path) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for number, (name, suffix, text) in enumerate(
        [("b", "txt", "second"), ("a", "json", '{"caption": "first"}'), ("deep/c", "txt", "\ufeffthird\n")]
    ):
        (tmp_path / "data" / f"{name}.jpg").write_bytes(image_bytes(number))
        (tmp_path / "data" / f"{name}.{suffix}").write_text(text, encoding="utf-8")
    (tmp_path / "data" / "deep" / "d.ppm").write_bytes(image_bytes(1, "PPM"))  # not one of the formats of shards
    index = pack(tmp_path / "data", tmp_path / "out", SMALL)
    assert captions(tmp_path / "out") == ["first", "second", "third"]
    assert index.rejected == {}


def test_other_keys_and_formats(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "elsewhere" / "a.ppm")
    file = write_table(tmp_path / "rows.csv", [{"file_name": "a.ppm", "text": "red"}])
    pack(file, tmp_path / "out", PackSettings(Keys("file_name", "text")), image_dir=tmp_path / "elsewhere")
    (item,) = web_pairs([str(tmp_path / "out" / "*.tar")]).in_order()
    assert isinstance(item, Example)
    assert bytes(item.images[0]).startswith(b"\x89PNG")


def test_images_inside_a_parquet_file(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": image_bytes(n), "path": f"{n}.jpg"}, "caption": f"caption {n}"} for n in range(3)]
    pack(write_table(tmp_path / "rows.parquet", rows), tmp_path / "out", SMALL)
    assert captions(tmp_path / "out") == ["caption 0", "caption 1", "caption 2"]


def test_rows_that_cannot_be_used_are_listed(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    (tmp_path / "broken.jpg").write_bytes(image_bytes(0)[:200])
    bad: list[Any] = [
        {"image": "no.png", "caption": "x"},
        {"image": "broken.jpg", "caption": "x"},
        {"image": rows[0]["image"], "caption": " "},
        {"image": rows[0]["image"], "caption": None},
        {"picture": rows[0]["image"], "caption": "x"},
        {"url": "http://example.com/a.jpg", "caption": "x"},
        {"image": [rows[0]["image"], rows[1]["image"]], "caption": "x"},
        {"image": rows[0]["image"], "conversations": []},
        {"image": rows[0]["image"], "caption": "half \ud83d"},
        ["a list"],
    ]
    file = write_table(tmp_path / "rows.jsonl", [*rows, *bad])
    with pytest.raises(DataError, match=r"10 of 20 rows cannot be used .*rows.jsonl:11: image .* not found"):
        pack(file, tmp_path / "out", SMALL)
    assert not (tmp_path / "out" / "index.json").exists()
    index = pack(file, tmp_path / "out", SMALL, max_rejected=0.5)
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [line["row"] for line in listed] == list(range(11, 21))
    assert all(f"rows.jsonl:{line['row']}" in line["message"] for line in listed if line["cause"] != "image")
    assert sum(index.rejected.values()) == len(listed) == 10
    assert "download the images with img2dataset" in listed[5]["message"]
    assert captions(tmp_path / "out") == [row["caption"] for row in rows]


def test_too_many_bad_rows_end_the_job_early(tmp_path: Path) -> None:
    lines = [json.dumps({"image": "no.png", "caption": "x"})] * 250 + ["this line is never read"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"200 of 200 rows cannot be used \(missing image: 200\)"):
        pack(tmp_path / "rows.jsonl", tmp_path / "out", SMALL)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("rows.jsonl", '{"image": "a.png", "caption": "x"}\n{"image\n', r"rows.jsonl:2: not valid JSON"),
        ("rows.json", '[{"image": "a.png", "caption": "x"},\n{"image" 1}]', r"rows.json:2: not valid JSON"),
        ("rows.csv", "image,image\na.png,b\n", r"rows.csv:1: the column 'image' occurs twice"),
        ("rows.csv", "", r"rows.csv: the file has no row"),
        ("rows.csv", 'image,caption\na.png,"x', r"rows.csv:2: not valid CSV: unexpected end of data"),
        ("rows.parquet", "PAR1 no", r"not a Parquet file, or it is damaged"),
        ("rows.xlsx", "", r"the ending '.xlsx' is unknown; known: .json, .jsonl"),
    ],
)
def test_files_that_cannot_be_read_say_where(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=words):
        pack(tmp_path / name, tmp_path / "out", SMALL)


def test_a_line_of_a_csv_with_too_few_fields_is_rejected(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_bytes("image,caption\r\na.png,é\r\na.png\r\n\r\n".encode("utf-16"))
    index = pack(tmp_path / "rows.csv", tmp_path / "out", SMALL, max_rejected=0.5)
    assert index.rejected == {"row": 1}
    assert "rows.csv:3: 1 fields" in (tmp_path / "out" / "rejected.jsonl").read_text()


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    file = write_table(tmp_path / "rows.jsonl", rows)
    pack(file, tmp_path / "out", SMALL)
    before = content(tmp_path / "out")
    assert pack(file, tmp_path / "out", SMALL).samples == 10  # the same job: done
    with pytest.raises(DataError, match=r"already holds 3 shards made from 'rows.jsonl'"):
        pack(file, tmp_path / "out", PackSettings(samples_per_shard=5))
    assert content(tmp_path / "out") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "00000.tar").write_bytes(b"mine")
    with pytest.raises(DataError, match="already has tar files"):
        pack(file, tmp_path / "other", SMALL)


def test_training_says_which_shards_differ(
    tmp_path: Path, rows: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    pack(write_table(tmp_path / "rows.jsonl", rows), tmp_path / "out", SMALL)
    urls = [str(tmp_path / "out" / "*.tar")]
    with caplog.at_level(logging.WARNING):
        web_pairs(urls)
    assert not caplog.records
    whole = (tmp_path / "out" / "00001.tar").read_bytes()
    (tmp_path / "out" / "00001.tar").write_bytes(whole[:-512])
    (tmp_path / "out" / "00002.tar").rename(tmp_path / "out" / "renamed.tar")
    with caplog.at_level(logging.WARNING):
        web_pairs(urls)
    assert "web: 3 shards are not as index.json says" in caplog.text
    assert "00001.tar: has 9,728 bytes, expected 10,240" in caplog.text
    assert "00002.tar: is missing; it has 2" in caplog.text
    assert "renamed.tar: is not in index.json" in caplog.text
    damaged = bytearray(whole)
    damaged[700] ^= 1
    (tmp_path / "out" / "00001.tar").write_bytes(damaged)
    shard = [str(tmp_path / "out" / "00001.tar")]
    assert not [line for line in differences(shard) if "00001" in line]
    assert any("00001.tar: has another checksum" in line for line in differences(shard, whole=True))


def test_a_damaged_index_is_an_error_and_another_programs_is_none(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"format": "minigpt4 shards 1", "shards": [{}]}')
    with pytest.raises(DataError, match=r"index.json: the index of the shards is damaged"):
        read_index(tmp_path)
    for text in ("[1]", "{", '{"format": 3}', "<html>"):
        (tmp_path / "index.json").write_text(text)
        assert read_index(tmp_path) is None


def test_a_large_list_is_read_in_constant_memory(tmp_path: Path) -> None:
    row = json.dumps({"image": "a.png", "caption": "x" * 4000})
    with (tmp_path / "rows.json").open("w") as file:
        file.write("[" + ",\n".join([row] * 8_000) + "]")  # 32 MB
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    tracemalloc.start()
    count = sum(1 for _ in TablePairs(tmp_path / "rows.json", Keys()).items())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 8_000
    assert peak < 12e6


def written(folder: Path) -> int:
    """Return how many bytes are in a folder, which a job may be changing."""
    total = 0
    for file in folder.glob("*"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


@pytest.mark.slow
def test_killed_at_random_instants_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    rows = write_images(tmp_path, 400)
    rows[50]["image"] = rows[351]["image"] = "no.png"
    file = write_table(tmp_path / "rows.jsonl", rows)
    settings = PackSettings(samples_per_shard=10)
    pack(file, tmp_path / "whole", settings)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([pack.__module__])
    rng = random.Random(3)
    killed = 0
    for _ in range(12):
        before = written(tmp_path / "out")
        job = context.Process(target=pack, args=(file, tmp_path / "out", settings))
        job.start()
        while job.is_alive() and written(tmp_path / "out") == before:  # let it begin
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        job.kill()
        job.join()
        killed += job.exitcode == -signal.SIGKILL
    assert killed >= 2
    pack(file, tmp_path / "out", settings)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_the_command(tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    rows[3]["caption"] = ""
    file = write_table(tmp_path / "rows.tsv", rows)
    command = ["data", "pack", str(file), "--out", str(tmp_path / "out"), "--samples-per-shard", "5"]
    assert main(command) == 1
    assert "1 of 10 rows cannot be used (caption: 1)" in capsys.readouterr().err
    assert main([*command, "--max-rejected", "0.2"]) == 0
    shown = capsys.readouterr().out
    assert "9 pairs in 2 shards" in shown
    assert "left out: 1 rows (caption: 1)" in shown
