"""Rows of real users: each is trained on, or skipped and counted, or refused; none is dropped or altered in silence."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt4.config.parts import ImageProcessorConfig
from minigpt4.conversation.encoder import ANSWER_CUT, END_MARK_IN_ANSWER
from minigpt4.datasets.conversations import Conversations
from minigpt4.datasets.loader import encode_example, fixed_batches
from minigpt4.datasets.source import WORDS_CUT, Example
from minigpt4.errors import DataError, ImageError
from minigpt4.processors.image import ImageProcessor
from minigpt4.processors.text import TextProcessor
from minigpt4.registry import PROCESSORS, Component
from tests.datasets.parts import SPEC, encoder, image_bytes, processor, web_pairs, write_shard

CASES = Path(__file__).parent.parent / "data" / "cases"


def source(file: Path, **values: Any) -> Conversations:
    config = Conversations.Config(path=str(file), **{"prompts": "", **values})
    return Conversations.from_config(config, name="own")


def case(name: str, file: str = "rows.jsonl") -> Conversations:
    return source(CASES / name / file, image_dir=str(CASES / name / "images"))


def written(folder: Path, *rows: Any, **values: Any) -> Conversations:
    for number in range(2):
        (folder / f"{number}.png").write_bytes(image_bytes(number, "PNG"))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return source(file, **values)


def counted(read: Any, **values: Any) -> tuple[int, Counter[str], Counter[str]]:
    """Return the samples trained on, and the counts of skipped and altered ones, over one pass."""
    trained, skipped, altered = 0, Counter[str](), Counter[str]()
    encode = encoder(**{"template": "vicuna_v0", **values})
    for batch in fixed_batches({"own": read}, encode, processor(), samples=10_000, batch_size=3, pad_id=0):
        trained += len(batch)
        skipped.update(batch.skipped)
        altered.update(batch.altered)
    return trained, skipped, altered


# An image under another key


def test_a_set_whose_images_stand_under_another_key_is_refused_at_start() -> None:
    with pytest.raises(DataError, match=r"none of the \d+ rows has an image; found the unknown keys 'image_path'"):
        case("02_image_under_another_key")


def test_images_are_read_as_image_is() -> None:
    trained, skipped, _ = counted(case("02_image_under_another_key", "rows_images.jsonl"))
    assert (trained, skipped) == (4, {})


def test_a_row_with_another_spelling_is_skipped_and_counted() -> None:
    rows = case("02_image_under_another_key", "rows_mixed.jsonl")
    trained, skipped, _ = counted(rows)
    assert trained + skipped["unknown key"] == len(rows)
    assert trained
    assert skipped["unknown key"]


@pytest.mark.parametrize(
    "stray",
    [
        {"image_path": "0.png"}, {"img": "0"}, {"image_url": "https://example.org/0"}, {"picture": "0"},
        {"file_name": "0"}, {"Image": "0.png"}, {"IMAGES": ["0"]}, {"photo": {"path": "0.png"}}, {"x": "a/0.JPG"},
        {"x": ["0.webp"]}, {"x": {"path": "0.tiff"}}, {"url": "https://example.org/0.jpg?size=2"},
        {"x": "data:image/png;base64,AAAA"}, {"image": None, "pixel_values": [1]}, {"images": [], "pic": "0"},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_looks_like_an_image_is_not_dropped(tmp_path: Path, stray: dict[str, Any]) -> None:
    read = written(tmp_path, {"image": "0.png", "caption": "good"}, {"caption": "x", **stray})
    _, item = read.in_order()
    assert isinstance(item, DataError)
    assert item.cause == "unknown key"
    assert f"the unknown key {list(stray)[-1]} looks like one" in str(item)
    assert "rows.jsonl:2" in str(item)


@pytest.mark.parametrize("extra", [{"topics": "cats"}, {"images": []}, {"image_path": None}, {"url": "a.html"}, {}])
def test_a_text_row_among_images_is_one(tmp_path: Path, extra: dict[str, Any]) -> None:
    read = written(tmp_path, {"image": "0.png", "caption": "good"}, {"caption": "x", **extra})
    assert counted(read)[:2] == (2, {})


def test_two_places_for_images_are_an_error(tmp_path: Path) -> None:
    (item,) = written(tmp_path, {"image": "0.png", "images": ["1.png"], "caption": "x"}).in_order()
    assert "found `image` and `images`" in str(item)


def test_unread_keys_are_logged_once_with_their_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"id": 1, "image": "0.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    with caplog.at_level(logging.WARNING):
        written(tmp_path, row, {**row, "source\x1b[2J": "web"}, {**row, "source\x1b[2J": "web", "caption": "lost"})
    assert r"the key 'source\x1b[2J' is not read (2 of 3 rows)" in caplog.text
    assert "the key 'caption' is not read (1 of 3 rows)" in caplog.text
    assert len(caplog.records) == 2


def test_a_set_without_images_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="set images: optional of own"):
        written(tmp_path, {"caption": "text"})
    assert counted(written(tmp_path, {"caption": "text"}, images="optional"))[0] == 1


# One sample never ends a run


def test_half_an_emoji_is_a_skip() -> None:
    rows = case("03_half_an_emoji")
    trained, skipped, _ = counted(rows)
    assert (trained, skipped["text"]) == (len(rows) - 1, 1)


def test_half_an_emoji_in_a_shard_is_a_skip(tmp_path: Path) -> None:
    texts = ['{"caption": "good"}', '{"caption": "cut \\ud83d"}']
    samples = [{"__key__": str(n), "jpg": image_bytes(n), "json": t.encode()} for n, t in enumerate(texts)]
    assert counted(web_pairs([str(write_shard(tmp_path / "a.tar", samples))]))[:2] == (1, {"text": 1})


def test_a_text_in_the_image_field_is_a_skip() -> None:
    rows = case("04_text_in_the_image_field")
    trained, skipped, _ = counted(rows)
    assert (trained, skipped) == (len(rows) - 1, {"missing image": 1})


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 5000, "nul\0.png", "\ud83d.png", ".", "/dev/zero", "loop.png"])
def test_names_that_no_image_has(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    read = written(tmp_path, {"image": "0.png", "caption": "good"}, {"image": name, "caption": "x"})
    assert counted(read)[:2] == (1, {"missing image": 1})
    with pytest.raises(ImageError) as error:
        processor()(tmp_path / name)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("size", [(4000, 3), (3, 4000), (1, 1), (900, 1)])
@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_an_image_of_any_shape_is_read(size: tuple[int, int], resize: Any) -> None:
    from PIL import Image

    config = ImageProcessorConfig(max_side=64, resize=resize)
    pixels = ImageProcessor.from_config(config, SPEC)(Image.new("RGB", size, (255, 0, 0)))
    assert pixels.shape == (3, 8, 8)
    assert torch.isfinite(pixels).all()


def test_the_banner_is_read() -> None:
    processed = ImageProcessor.from_config(ImageProcessorConfig(max_side=64), SPEC)
    assert processed(CASES / "01_thin_image" / "banner.png").shape == (3, 8, 8)


def test_an_unforeseen_error_is_a_skip_with_its_place(tmp_path: Path) -> None:
    class Fails(TextProcessor):
        def __call__(self, text: str) -> str:
            if text == "bad":
                raise ZeroDivisionError("of a plugin")
            return text

    read = written(tmp_path, {"image": "0.png", "caption": "good"}, {"image": "0.png", "caption": "bad"})
    read.process_text = Fails()
    assert counted(read)[:2] == (1, {"ZeroDivisionError": 1})
    assert "rows.jsonl:2: cannot be used (ZeroDivisionError: of a plugin)" in str(list(read.in_order())[1])


def test_a_text_of_megabytes_is_a_skip(tmp_path: Path) -> None:
    huge = "word " * 300_000
    read = written(tmp_path, {"image": "0.png", "caption": "good"}, {"image": "0.png", "caption": huge})
    assert counted(read)[:2] == (1, {"text too large": 1})


TEXTS = st.text(st.characters(), max_size=12) | st.sampled_from(["0.png", "###", "\ud83d", "<image>", "</s>", " "])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "x"]), "value": TEXTS}) | VALUES,
    max_size=4,
)
ROWS = st.dictionaries(
    st.sampled_from(["image", "images", "caption", "img", "id", "x"]) | TEXTS, TEXTS | VALUES, max_size=4
) | st.fixed_dictionaries({"image": st.just("0.png"), "conversations": MESSAGES})


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS | VALUES, max_size=6))
def test_rows_in_are_rows_trained_and_rows_counted(tmp_path: Path, rows: list[Any]) -> None:
    read = written(tmp_path, *rows, {"image": "0.png", "caption": "good"}, images="optional")
    trained, skipped, _ = counted(read)
    assert trained + sum(skipped.values()) == len(rows) + 1


# Altered samples are counted


def test_answers_that_are_cut_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows = case("10_long_answers_cut_in_silence")
        trained, _, altered = counted(rows, max_answer_tokens=8)
    assert altered == {ANSWER_CUT: trained}
    assert caplog.text.count(ANSWER_CUT) == 1
    assert "raise conversation.max_answer_tokens" in caplog.text


@pytest.mark.parametrize(
    ("template", "answer", "count"),
    [
        ("vicuna_v0", "A cat.\n### Details", 1), ("plain", "A cat\nPhoto, 2019", 1), ("llama2", "a </s> tag", 1),
        ("vicuna_v0", "A cat.\n## Details", 0), ("llama2", "A cat.\n### Details", 0),
    ],
)  # fmt: skip
def test_answers_with_the_end_mark_are_counted(
    tmp_path: Path, template: str, answer: str, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    read = written(tmp_path, {"image": "0.png", "caption": answer}, {"image": "0.png", "caption": "short"})
    with caplog.at_level(logging.WARNING):
        _, _, altered = counted(read, template=template)
    assert altered == ({END_MARK_IN_ANSWER: 1} if count else {})
    assert caplog.text.count("chat ends an answer there") == count


def test_the_markdown_case_is_counted() -> None:
    rows = source(
        CASES / "09_answer_holds_the_end_mark" / "rows.jsonl",
        image_dir=str(CASES / "09_answer_holds_the_end_mark/images"),
    )
    assert counted(rows)[2] == {END_MARK_IN_ANSWER: 1}


def test_cut_words_are_counted(tmp_path: Path) -> None:
    cut = Component(PROCESSORS, "text", TextProcessor.Config(max_words=2))
    read = written(tmp_path, *({"image": "0.png", "caption": c} for c in ("one two", "one two three")), text=cut)
    assert counted(read)[2] == {WORDS_CUT: 1}
    samples = [{"__key__": "k", "jpg": image_bytes(1), "txt": b"one two three"}]
    assert counted(web_pairs([str(write_shard(tmp_path / "a.tar", samples))], text=cut))[2] == {WORDS_CUT: 1}


def test_a_sample_carries_what_was_altered(tmp_path: Path) -> None:
    (item,) = written(tmp_path, {"image": "0.png", "caption": "a ### b"}).in_order()
    assert isinstance(item, Example)
    sample = encode_example(item, encoder(template="vicuna_v0", max_answer_tokens=3), processor())
    assert sample.altered == {ANSWER_CUT: 1, END_MARK_IN_ANSWER: 1}
