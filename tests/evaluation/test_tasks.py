"""Each task reads its data set's own layout, and names file and line of what it cannot read."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minigpt4.config.schema import adapter
from minigpt4.errors import DataError
from minigpt4.registry import TASKS


def build(kind: str, **values: Any):
    return TASKS.get(kind).from_config(adapter(TASKS.settings(kind)).validate_python(values), name="mine")


def write(folder: Path, name: str, content: Any) -> str:
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


COCO = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}, {"id": 3, "file_name": "c.jpg"}],
    "annotations": [
        {"image_id": 2, "caption": "two"},
        {"image_id": 1, "caption": "one"},
        {"image_id": 2, "caption": "zwei é"},
    ],
}
KARPATHY = {
    "images": [
        {"filename": "a.jpg", "filepath": "val2014", "split": "test", "sentences": [{"raw": "One."}]},
        {"filename": "b.jpg", "filepath": "val2014", "split": "val", "sentences": [{"raw": "Two."}]},
    ]
}


@pytest.mark.parametrize(
    ("layout", "content", "expected"),
    [
        ("coco", COCO, {"a.jpg": ["one"], "b.jpg": ["two", "zwei é"]}),
        ("nocaps", COCO, {"a.jpg": ["one"], "b.jpg": ["two", "zwei é"]}),
        ("karpathy", KARPATHY, {"val2014/a.jpg": ["One."]}),
        ("flickr", "a.jpg#0\tone\na.jpg#1\teins\nb.jpg#0\ttwo\n", {"a.jpg": ["one", "eins"], "b.jpg": ["two"]}),
    ],
)
def test_captions(layout, content, expected, tmp_path):
    file = write(tmp_path, "captions", content)
    found = build("captions", annotations=file, image_dir=str(tmp_path), layout=layout).questions()
    assert {q.image: q.truth["captions"] for q in found} == expected
    assert found[0].source == tmp_path / found[0].image
    assert found[0].text.startswith("Please describe the image shortly")


def test_vqav2_and_ok_vqa(tmp_path):
    asked = write(tmp_path, "q", {"questions": [{"image_id": 42, "question": "What?", "question_id": 420}]})
    answers = [{"answer": "cat", "answer_id": n} for n in range(10)]
    known = write(tmp_path, "a", {"annotations": [{"question_id": 420, "answers": answers, "answer_type": "other"}]})
    task = build("vqa", questions=asked, annotations=known, image_dir=str(tmp_path))
    (found,) = task.questions()
    assert (found.id, found.image, found.kind) == ("420", "COCO_val2014_000000000042.jpg", "other")
    assert found.text == "Based on the image, respond to this question with a short answer: What?"
    assert found.truth == {"answers": ["cat"] * 10}
    assert task.scorer == "vqa"


GQA = {"7": {"imageId": "n1", "question": "Is it red?", "answer": "yes", "types": {"structural": "verify"}}}
VIZWIZ = [{"image": "v.jpg", "question": "What?", "answers": [{"answer": "unanswerable"}] * 10, "answer_type": "other"}]
AOKVQA = [
    {
        "question_id": "x",
        "image_id": 5,
        "question": "?",
        "direct_answers": ["a"] * 10,
        "difficult_direct_answer": False,
    },
    {"question_id": "y", "image_id": 6, "question": "?", "direct_answers": ["a"] * 10, "difficult_direct_answer": True},
]


@pytest.mark.parametrize(
    ("layout", "content", "scorer", "found"),
    [
        ("gqa", GQA, "exact", ("7", "n1.jpg", {"answer": "yes"}, "verify")),
        ("vizwiz", VIZWIZ, "vizwiz", ("0", "v.jpg", {"answers": ["unanswerable"] * 10}, "other")),
        ("aokvqa", AOKVQA, "vizwiz", ("x", "000000000005.jpg", {"answers": ["a"] * 10}, "")),
    ],
)
def test_other_vqa_layouts(layout, content, scorer, found, tmp_path):
    task = build("vqa", questions=write(tmp_path, "q.json", content), image_dir=str(tmp_path), layout=layout)
    (one,) = task.questions()
    assert (one.id, one.image, one.truth, one.kind) == found
    assert task.scorer == scorer


A_OKVQA = [
    {"question_id": "x", "image_id": 5, "question": "?", "choices": ["a", "b", "c", "d"], "correct_choice_idx": 2}
]
SCIENCE = {
    "1": {"split": "test", "image": "image.png", "hint": "H.", "question": "Q?", "choices": ["a", "b"], "answer": 1},
    "2": {"split": "test", "image": None, "hint": "", "question": "Q?", "choices": ["a", "b"], "answer": 1},
    "3": {"split": "val", "image": "image.png", "hint": "", "question": "Q?", "choices": ["a", "b"], "answer": 1},
}
ICON = {"9": {"question": "How many?", "choices": ["1", "2"], "answer": 0}}


@pytest.mark.parametrize(
    ("layout", "content", "expected"),
    [
        ("aokvqa", A_OKVQA, ("x", "000000000005.jpg", "?", "c")),
        ("scienceqa", SCIENCE, ("1", "test/1/image.png", "H. Q?", "b")),
        ("iconqa", ICON, ("9", "9/image.png", "How many?", "1")),
    ],
)
def test_choices(layout, content, expected, tmp_path):
    task = build("choices", questions=write(tmp_path, "q.json", content), image_dir=str(tmp_path), layout=layout)
    (found,) = task.questions()
    assert (found.id, found.image, found.text, found.truth["answer"]) == expected
    assert found.truth["answer"] in found.choices


def test_pope(tmp_path):
    files = []
    for split in ("random", "popular"):
        row = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "no"}
        files.append(write(tmp_path, f"coco_pope_{split}.json", json.dumps(row) + "\n"))
    found = build("pope", files=files, image_dir=str(tmp_path)).questions()
    assert [(q.id, q.kind, q.truth) for q in found] == [
        ("random/1", "random", {"answer": "no"}),
        ("popular/1", "popular", {"answer": "no"}),
    ]


def png(colour: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(content, "PNG")
    return content.getvalue()


def test_a_tsv_file_of_vlmevalkit(tmp_path):
    """Images in base64; a later row refers to the image of an earlier one; choices in columns."""
    encoded = base64.b64encode(png("red")).decode()
    lines = [
        "index\timage\tquestion\tA\tB\tC\tanswer\tcategory",
        f"0\t{encoded}\tWhat colour?\tred\tblue\t\tA\tcolour",
        '1\t0\t"Two\nlines?"\tno\tyes\tmaybe\tC\tother',
    ]
    file = write(tmp_path, "bench.tsv", "\n".join(lines) + "\n")
    first, second = build("rows", path=file, scorer="choices").questions()
    assert (first.choices, first.truth["answer"], first.kind) == (["red", "blue"], "red", "colour")
    assert (second.text, second.choices, second.truth["answer"]) == ("Two\nlines?", ["no", "yes", "maybe"], "maybe")
    assert first.source == second.source == png("red")
    assert first.image == second.image


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", '{"image": "a.png", "question": "?"}\n', "r.jsonl:1: the scorer 'exact' needs 'answer'"),
        ("r.jsonl", '\n{"image": 3, "question": "?", "answer": "x"}\n', "r.jsonl:2: `image` must be a path, found 3"),
        ("r.jsonl", '{"image": "a", "question": 1}\n', "r.jsonl:1: must be an object with a text `question`"),
        ("r.jsonl", '{"answer": "x"}\n{]\n', "r.jsonl:2: not valid JSON"),
        ("r.jsonl", '{"question": "?", "answer": 3}\n', "'answer' must be text, found 3"),
        ("r.tsv", "a\tb\n1\t2\n", "r.tsv:1: needs the columns index, question, and image"),
        ("r.tsv", "index\timage\tquestion\tanswer\n0\t???\twhat\tx\n", "r.tsv:2: `image` is neither base64 nor"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_line(name, content, message, tmp_path):
    with pytest.raises(DataError, match=message.replace("?", r"\?").replace("(", r"\(")):
        build("rows", path=write(tmp_path, name, content)).questions()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("captions", {"annotations": "f", "layout": "coco"}),
        ("captions", {"annotations": "f", "layout": "karpathy"}),
        ("vqa", {"questions": "f", "layout": "gqa"}),
        ("vqa", {"questions": "f", "layout": "vizwiz"}),
        ("choices", {"questions": "f", "layout": "iconqa"}),
    ],
)
def test_another_layout_is_named(kind, values, tmp_path):
    file = write(tmp_path, "f", [{"x": 1}])
    values = {key: file if item == "f" else item for key, item in values.items()}
    with pytest.raises(DataError, match="does not have the layout"):
        build(kind, image_dir=str(tmp_path), **values).questions()


def test_easy_vqa_in_three_forms(tmp_path):
    folder = tmp_path / "test"
    (folder / "images").mkdir(parents=True)
    rows = [
        ["what color is the shape?", "red", 0],
        ["is there a circle?", "yes", 0],
        ["what shape is it?", "circle", 1],
    ]
    write(folder, "questions.json", rows)
    asked = build("easy_vqa", path=str(tmp_path)).questions()
    assert [(q.id, q.truth["answer"], q.facts) for q in asked[:2]] == [
        ("0", "red", ("red", "circle")),
        ("1", "yes", ("red", "circle")),
    ]
    ranked = build("easy_vqa", path=str(tmp_path), form="choices").questions()
    assert [len(q.choices) for q in ranked] == [8, 3]
    described = build("easy_vqa", path=str(tmp_path), form="captions").questions()
    assert [q.image for q in described] == ["0.png", "1.png"]
    assert described[0].truth["captions"][0] == "The image shows a red circle."
