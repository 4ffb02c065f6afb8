"""Aligned pairs, conversations and easy-VQA: their layouts, their order and their errors."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minigpt4.config.parts import SourceConfig
from minigpt4.conversation.dialogue import Turn, read_prompts
from minigpt4.datasets.aligned_pairs import AlignedPairs
from minigpt4.datasets.conversations import Conversations
from minigpt4.datasets.easy_vqa import COLOURS, SHAPES, EasyVQA, Question, questions, subject_of
from minigpt4.datasets.source import Example, Item
from minigpt4.errors import DataError
from minigpt4.processors.text import BlipCaption
from minigpt4.registry import PROCESSORS, Component
from tests.datasets.parts import answers, image_bytes, write_conversations, write_prompts


def example(item: Item) -> Example:
    assert isinstance(item, Example), item
    return item


# Prompts


def test_prompts_are_lines_with_one_spelling_of_the_mark(tmp_path: Path) -> None:
    assert read_prompts(write_prompts(tmp_path))[:1] == ["<ImageHere> Describe this image, wording 0."]


def test_bad_prompt_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompt file 'no_such' not found"):
        read_prompts("no_such")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="has no prompt"):
        read_prompts(str(tmp_path / "empty.txt"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_prompts(str(tmp_path / "bytes.txt"))


# Aligned pairs


def aligned(folder: Path, annotations: Any, images: int = 4, prompts: str | None = None) -> AlignedPairs:
    (folder / "image").mkdir(exist_ok=True)
    for number in range(images):
        suffix = ("jpg", "jpeg", "png", "webp")[number % 4]
        (folder / "image" / f"{number}.{suffix}").write_bytes(image_bytes(number))
    (folder / "filter_cap.json").write_text(json.dumps(annotations))
    prompts = write_prompts(folder) if prompts is None else prompts
    return AlignedPairs.from_config(AlignedPairs.Config(path=str(folder), prompts=prompts), name="aligned")


def pairs(count: int) -> dict[str, Any]:
    return {"annotations": [{"image_id": str(n), "caption": f"caption {n}"} for n in range(count)]}


def test_aligned_pairs_draw_an_instruction_per_sample(tmp_path: Path) -> None:
    source = aligned(tmp_path, pairs(4))
    items = [example(item) for item in islice(source.stream(1, 0, 1), 40)]
    prompts = Counter(item.dialogue.turns[0].question for item in items)
    assert len(prompts) == 4
    assert all(prompt.startswith("<ImageHere> Describe") for prompt in prompts)
    assert sorted(answers(list(items[:4]))) == [f"caption {n}" for n in range(4)]
    for item in items:
        assert item.images[0].stem == str(item.dialogue.turns[0].answer).split()[1]  # type: ignore[union-attr]
    assert items == list(islice(source.stream(1, 0, 1), 40))


def test_aligned_pairs_without_prompts(tmp_path: Path) -> None:
    assert example(next(aligned(tmp_path, pairs(2), prompts="").in_order())).dialogue.turns[0].question == ""


@pytest.mark.parametrize(
    ("annotation", "cause", "words"),
    [
        ({"image_id": "77", "caption": "x"}, "missing image", "image 77.jpg (or .jpeg, .png, .webp) not found"),
        ({"image_id": "1", "caption": " "}, "caption", "the caption is empty"),
        ({"image_id": "1"}, "caption", "(image 1): the caption is missing"),
        ({"caption": "x"}, "row", "expected an object with `image_id`"),
        ("text", "row", "filter_cap.json item 2: expected an object"),
    ],
)
def test_a_bad_annotation(tmp_path: Path, annotation: Any, cause: str, words: str) -> None:
    rows = pairs(2)["annotations"]
    items = list(aligned(tmp_path, {"annotations": [rows[0], annotation, rows[1]]}).in_order())
    assert answers(items) == ["caption 0", f"error: {cause}", "caption 1"]
    assert words in str(items[1])


def test_a_bad_aligned_folder(tmp_path: Path) -> None:
    config = AlignedPairs.Config(path=str(tmp_path / "none"), prompts="")
    with pytest.raises(DataError, match=r"aligned: folder .* not found; set path of"):
        AlignedPairs.from_config(config, name="aligned")
    with pytest.raises(DataError, match=r"aligned: file .*filter_cap\.json' not found"):
        AlignedPairs.from_config(AlignedPairs.Config(path=str(tmp_path), prompts=""), name="aligned")
    nothing: list[Any] = [[], {}, {"annotations": []}]
    for content in nothing:
        with pytest.raises(DataError, match="at least one annotation"):
            aligned(tmp_path, content)
    with pytest.raises(DataError, match="none of the 1 images"):
        aligned(tmp_path, {"annotations": [{"image_id": "99", "caption": "x"}]})
    (tmp_path / "filter_cap.json").write_text('{"annotations": [\n{]}')
    with pytest.raises(DataError, match=r"filter_cap.json:2: not valid JSON"):
        AlignedPairs.from_config(AlignedPairs.Config(path=str(tmp_path), prompts=""), name="aligned")


# The stream of every indexed source


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Conversations:
    folder = tmp_path_factory.mktemp("rows")
    file = write_conversations(folder, 13)
    return Conversations.from_config(Conversations.Config(path=str(file), prompts=write_prompts(folder)), name="rows")


@pytest.mark.parametrize("readers", [1, 2, 5, 20])
def test_readers_share_each_epoch(rows: Conversations, readers: int) -> None:
    streams = [rows.stream(1, reader, readers) for reader in range(readers)]
    turn_by_turn = [next(streams[n % readers]) for n in range(26)]
    every = sorted(f"row {n}" for n in range(13))
    assert sorted(answers(turn_by_turn[:13])) == every
    assert sorted(answers(turn_by_turn[13:])) == every
    assert answers(turn_by_turn[:13]) != answers(turn_by_turn[13:])


@pytest.mark.parametrize("start", [1, 6, 7, 50, 1_000_000])
def test_start_equals_draining(rows: Conversations, start: int) -> None:
    resumed = list(islice(rows.stream(9, 1, 2, start), 5))
    if start < 1000:
        assert resumed == list(islice(rows.stream(9, 1, 2), start, start + 5))
    assert answers(resumed)


def test_seeds_and_names_change_the_order(rows: Conversations) -> None:
    other = Conversations.from_config(Conversations.Config(path=str(rows.annotations), prompts=""), name="other")
    orders = [answers(list(islice(s.stream(seed, 0, 1), 13))) for s, seed in ((rows, 1), (rows, 2), (other, 1))]
    assert len({tuple(order) for order in orders}) == 3


# Conversations


def conversations(folder: Path, content: str, suffix: str = "jsonl", **settings: Any) -> Conversations:
    for number in range(3):
        (folder / f"{number}.png").write_bytes(image_bytes(number, "PNG"))
    file = folder / f"data.{suffix}"
    file.write_text(content)
    config = Conversations.Config(path=str(file), **{"prompts": write_prompts(folder), **settings})
    return Conversations.from_config(config, name="own")


def said(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": text} for speaker, text in messages]


def test_llava_layout(tmp_path: Path) -> None:
    row = {
        "id": "1",
        "image": ["0.png", "1.png"],
        "conversations": said(
            ("system", "Be brief."), ("human", "<image>\n<image>\nWhich?"), ("gpt", " The first. "),
            ("user", "Why?"), ("assistant", "It is red."),
        ),
    }  # fmt: skip
    item = example(next(conversations(tmp_path, json.dumps([row]), "json").in_order()))
    assert item.id == "data.json item 1"
    assert item.images == (tmp_path / "0.png", tmp_path / "1.png")
    assert item.dialogue.system == "Be brief."
    assert item.dialogue.num_image_marks == 2
    assert item.dialogue.turns[1] == Turn("Why?", "It is red.")
    assert item.dialogue.turns[0].answer == "The first."


def test_captions_and_text_only_rows(tmp_path: Path) -> None:
    lines = [
        {"image": "2.png", "caption": "A CAT."},
        {"conversations": said(("human", "Hello?"), ("gpt", "Hello."))},
        {"caption": "No picture."},
        {"image": ["0.png", "1.png"], "caption": "Two."},
    ]
    content = "\n\n".join(map(json.dumps, lines))
    clean = Component(PROCESSORS, "blip_caption", BlipCaption.Config())
    first, text, bare, two = map(example, conversations(tmp_path, content, text=clean).in_order())
    assert first.dialogue.turns[0].answer == "a cat"
    assert first.dialogue.turns[0].question.startswith("<ImageHere> Describe")
    assert [first.id, text.id] == ["data.jsonl:1", "data.jsonl:3"]
    assert text.images == bare.images == ()
    assert "<ImageHere>" not in bare.dialogue.turns[0].question + two.dialogue.turns[0].question


def test_image_dir(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "elsewhere" / "deep.bmp")
    content = json.dumps({"image": "deep.bmp", "caption": "x"})
    item = example(next(conversations(tmp_path, content, image_dir=str(tmp_path / "elsewhere")).in_order()))
    assert item.images == (tmp_path / "elsewhere" / "deep.bmp",)


ASKED = ("human", "Q")
BAD_ROWS: list[tuple[Any, str, str]] = [
    (["a list"], "row", "a row must be an object"),
    ({}, "row", "expected `conversations` or `caption`, found no keys"),
    ({"text": "x"}, "row", "`caption`, found text"),
    ({"caption": 3}, "caption", "caption must be text, found 3"),
    ({"caption": "  "}, "caption", "the caption is empty"),
    ({"image": "9.png", "caption": "x"}, "missing image", "image "),
    ({"image": {"a": 1}, "caption": "x"}, "row", "image must be a path"),
    ({"image": "", "caption": "x"}, "row", "image must be a path"),
    ({"conversations": []}, "conversation", "must be a list of messages"),
    ({"conversations": "hi"}, "conversation", "must be a list of messages"),
    ({"conversations": ["hi"]}, "conversation", 'message 1: must be {"from"'),
    ({"conversations": said(("bird", "tweet"))}, "conversation", "message 1: unknown speaker 'bird'"),
    ({"conversations": said(ASKED, ASKED)}, "conversation", "message 2: two questions in a row"),
    ({"conversations": said(("gpt", "A"))}, "conversation", "message 1: an answer without a question"),
    ({"conversations": said(ASKED)}, "conversation", "the last question has no answer"),
    ({"conversations": said(("system", "x"))}, "conversation", "the last question has no answer"),
    ({"conversations": said(ASKED, ("gpt", " "))}, "conversation", "message 2: the answer is empty"),
    ({"conversations": said(("human", "<image> Q"), ("gpt", "A"))}, "image count", "1 image(s)"),
    ({"image": ["0.png", "1.png"], "conversations": said(("human", "<image>"), ("gpt", "A"))}, "image count", "has 2"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "cause", "words"), BAD_ROWS, ids=[words for _, _, words in BAD_ROWS])
def test_a_bad_row_names_its_line(tmp_path: Path, row: Any, cause: str, words: str) -> None:
    good = {"image": "0.png", "caption": "good"}
    items = list(conversations(tmp_path, "\n".join(map(json.dumps, (good, row, good)))).in_order())
    assert answers(items) == ["good", f"error: {cause}", "good"]
    assert words in str(items[1])
    assert "data.jsonl:2" in str(items[1])


@pytest.mark.parametrize(
    ("content", "suffix", "words"),
    [
        ('{"caption": "x"}\n{"caption": \n', "jsonl", r"data.jsonl:2: not valid JSON"),
        ('[{"caption": "x"},\n{"caption" "y"}]', "json", r"data.json:2: not valid JSON"),
        ('{"caption": "x"}\n{"caption": "y"}\n', "json", r"data.json:1: .*one row per line must be named .jsonl"),
        ('{"caption": "x"}', "json", "must be a list of rows"),
        ("[]", "json", "the file has no row"),
        ("\n\n", "jsonl", "the file has no row"),
    ],
)
def test_a_file_that_is_not_rows(tmp_path: Path, content: str, suffix: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        conversations(tmp_path, content, suffix)


def test_a_missing_file_or_image_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"own: file .* not found; set path of"):
        Conversations.from_config(Conversations.Config(path=str(tmp_path / "no.json")), name="own")
    with pytest.raises(DataError, match=r"own: folder .* not found; set image_dir of"):
        conversations(tmp_path, "[{}]", "json", image_dir=str(tmp_path / "none"))


def test_a_file_of_bad_rows_ends_its_stream(tmp_path: Path) -> None:
    stream = conversations(tmp_path, '{"x": 1}\n{"y": 2}', images="optional").stream(1, 0, 1)
    assert answers(list(islice(stream, 2))) == ["error: row"] * 2
    with pytest.raises(DataError, match="own: the last 2 samples all failed; the last error"):
        next(stream)


# easy-VQA

ASKED_OF = [
    ["what color is the shape?", "red", 0], ["is there a circle?", "yes", 0], ["is there a blue shape?", "no", 0],
    ["what is the blue shape?", "triangle", 1], ["is there not a circle?", "yes", 1],
    ["does the image not contain a rectangle?", "no", 2], ["is a teal shape present?", "no", 2],
    ["is no green shape present?", "no", 3],
    ["is there a red shape?", "no", 4],
]  # fmt: skip
SUBJECTS = ["a red circle", "a blue triangle", "a rectangle", "a green shape", "a shape"]


@pytest.fixture
def easy(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        (tmp_path / split / "images").mkdir(parents=True)
        (tmp_path / split / "questions.json").write_text(json.dumps(ASKED_OF))
        for number in range(5):
            (tmp_path / split / "images" / f"{number}.png").write_bytes(image_bytes(number, "PNG"))
    return tmp_path


def easy_vqa(folder: Path, form: Any, **settings: Any) -> EasyVQA:
    config = EasyVQA.Config(path=str(folder), form=form, prompts=write_prompts(folder), **settings)
    return EasyVQA.from_config(config, name="easy")


def test_subjects_come_from_the_questions(easy: Path) -> None:
    asked = questions(easy, "test")
    assert asked[0] == Question("what color is the shape?", "red", 0)
    assert [subject_of([q for q in asked if q.image_id == n]) for n in range(5)] == SUBJECTS


def test_captions_are_true_and_worded_in_several_ways(easy: Path) -> None:
    items = [example(item) for item in islice(easy_vqa(easy, "captions").stream(1, 0, 1), 200)]
    found: dict[str, set[str]] = {}
    for item in items:
        (turn,) = item.dialogue.turns
        assert turn.question == ""
        found.setdefault(item.id, set()).add(str(turn.answer))
    for number, subject in enumerate(SUBJECTS):
        texts = found[f"easy_vqa/train/{number}"]
        assert len(texts) >= 3
        assert all(subject in text for text in texts)


def test_questions_are_the_images_own_in_a_drawn_order(easy: Path) -> None:
    items = [example(item) for item in islice(easy_vqa(easy, "questions").stream(1, 0, 1), 100)]
    orders = {tuple(t.question for t in item.dialogue.turns) for item in items if item.id.endswith("/0")}
    assert len(orders) > 3
    own = {(text, answer) for text, answer, image in ASKED_OF if image == 0}
    for item in items:
        assert item.id[-1] != "0" or {(t.question, t.answer) for t in item.dialogue.turns} == own
    few = [example(item) for item in islice(easy_vqa(easy, "questions", questions_per_image=1).stream(1, 0, 1), 50)]
    assert {len(item.dialogue.turns) for item in few} == {1}
    assert len({item.dialogue.turns[0].question for item in few}) > 6


@pytest.mark.mini
@pytest.mark.parametrize(
    ("ask", "number"),
    [({"what": 1, "presence": 8}, 9), ({"negated": 2}, 2), ({"what": 2, "presence": 2, "negated": 4}, 8)],
)
def test_asked_by_kind_the_answers_are_true_and_presence_cannot_be_guessed(ask, number) -> None:
    right = {(q.text, q.image_id): q.answer for q in questions("asset:easy-vqa", "train")}
    config = EasyVQA.Config(path="asset:easy-vqa", form="questions", ask=ask)
    known = 0
    found: Counter[str] = Counter()
    for item in map(example, islice(EasyVQA.from_config(config, name="easy").stream(1, 0, 1), 400)):
        image = int(item.id.rpartition("/")[2])
        assert number - ask.get("what", 0) <= len(item.dialogue.turns) <= number
        for turn in item.dialogue.turns:
            own = right.get((turn.question, image))
            known += own is not None
            assert own in (None, turn.answer), (image, turn)
            kind = "what"
            if turn.answer in ("yes", "no"):
                kind = "negated" if {"not", "no"} & set(turn.question.split()) else "presence"
            found[kind] += 1
            found["yes"] += turn.answer == "yes"
    assert known > 50, "many drawn questions are ones that the set itself asks of the image"
    assert found["presence"] == 400 * ask.get("presence", 0)
    assert found["negated"] == 400 * ask.get("negated", 0)
    assert found["what"] >= 180 * ask.get("what", 0)
    assert found["yes"] == (found["presence"] + found["negated"]) / 2


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"wat": 1}, "ask: unknown kind 'wat'; the kinds are what, presence, negated"),
        ({"presence": 3}, "ask.presence must be even, found 3"),
        ({"what": -1, "presence": 2}, "ask.what\n  Input should be greater than or equal to 0"),
        ({"what": 0}, "ask: every number is 0"),
    ],
)
def test_what_cannot_be_asked_is_said(ask, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EasyVQA.Config(path="x", form="questions", ask=ask)
    with pytest.raises(ValueError, match="ask cannot be combined with questions_per_image or with form: captions"):
        EasyVQA.Config(path="x", form="questions", ask={"what": 1}, questions_per_image=1)
    with pytest.raises(ValueError, match="ask cannot be combined with questions_per_image or with form: captions"):
        EasyVQA.Config(path="x", form="captions", ask={"what": 1})


def test_images_without_questions_are_left_out_and_counted(easy: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert len(easy_vqa(easy, "questions", ask={"what": 1})) == 2
    assert "easy: 3 images are left out: ask gives no question for them" in caplog.text
    with pytest.raises(DataError, match=r"easy: ask \{'what': 1\} gives no question for any image"):
        easy_vqa(easy, "questions", ask={"what": 1}, image_range=(2, 5))


def test_a_set_that_never_asks_so_cannot_be_asked_by_kind(easy: Path) -> None:
    with pytest.raises(DataError, match=r"easy: ask\.negated: train has no such question about \w+"):
        easy_vqa(easy, "questions", ask={"negated": 2})


def test_conversations_hold_one_description_anywhere(easy: Path) -> None:
    places = set()
    for item in islice(easy_vqa(easy, "conversations").stream(1, 0, 1), 100):
        turns = example(item).dialogue.turns
        (place,) = [n for n, turn in enumerate(turns) if turn.question.startswith("Describe this image")]
        assert example(item).dialogue.num_image_marks == 0
        assert SUBJECTS[int(example(item).id[-1])] in str(turns[place].answer)
        if len(turns) == 4:
            places.add(place)
    assert places == {0, 1, 2, 3}


def test_image_range_holds_images_out(easy: Path) -> None:
    ids = [example(item).id[-1] for item in easy_vqa(easy, "captions", image_range=(3, 5)).in_order()]
    assert ids == ["3", "4"]
    assert len(easy_vqa(easy, "captions", image_range=(0, 3))) == 3
    assert len(easy_vqa(easy, "captions", split="test")) == 5
    with pytest.raises(DataError, match="no image in image_range"):
        easy_vqa(easy, "captions", image_range=(10, 20))


@pytest.mark.parametrize("settings", [{"image_range": (4, 2)}, {"questions_per_image": -1}])
def test_settings_that_make_no_sense(easy: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        easy_vqa(easy, "captions", **settings)


def test_an_incomplete_folder(easy: Path) -> None:
    with pytest.raises(DataError, match=r"easy: folder .* not found"):
        easy_vqa(easy, "captions").from_config(EasyVQA.Config(path="/no/such", form="captions"), name="easy")
    (easy / "train" / "images" / "3.png").unlink()
    with pytest.raises(DataError, match=r"1 of 5 images are missing \(3.png\)"):
        easy_vqa(easy, "captions")
    (easy / "train" / "questions.json").write_text('[["a", "b"]]')
    with pytest.raises(DataError, match=r"must be a list of \[question, answer, image number\]"):
        easy_vqa(easy, "captions")
    (easy / "train" / "questions.json").unlink()
    with pytest.raises(DataError, match="is not the easy-VQA folder"):
        easy_vqa(easy, "captions")


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("what is the red shape?", "circle", "shape"),
        ("what color is the circle?", "red", "colour"),
        ("is there a red shape?", "no", "yes/no"),
        ("is there not a red shape?", "no", "yes/no negated"),
        ("is no red shape present?", "yes", "yes/no negated"),
    ],
)
def test_kinds(question: str, answer: str, kind: str) -> None:
    assert Question(question, answer, 0).kind == kind
    assert len(COLOURS) + len(SHAPES) + 2 == 13


def test_every_source_config_has_a_text_processor() -> None:
    assert SourceConfig().text.build()(" x ") == "x"
