"""A session on disk: reopened, it continues as if it had never stopped."""

from __future__ import annotations

import json
import logging
import re

import pytest

from minigpt4.chat.session import Chat, Session
from minigpt4.chat.storage import FILE
from minigpt4.config.sections import ChatConfig
from minigpt4.errors import ConversationError, ImageError
from tests.chat.conftest import image

SETTINGS = ChatConfig(max_new_tokens=6)


@pytest.fixture
def session(loaded, tmp_path) -> Session:
    image("red").save(tmp_path / "red.jpg")
    session = Chat(loaded, SETTINGS).session([tmp_path / "red.jpg"], system="Be kind.")
    session.ask("What is this?")
    session.ask("And that?", images=[image("blue")])
    return session


def test_a_reopened_session_continues(loaded, session, tmp_path):
    session.save(tmp_path / "saved")
    (tmp_path / "red.jpg").unlink()
    chat = Chat(loaded, SETTINGS)
    again = chat.open(tmp_path / "saved")
    assert again.dialogue == session.dialogue
    assert len(again.pictures) == 2
    wanted = session.ask("Why?")
    assert again.ask("Why?") == wanted
    assert again.last.prompt_tokens == session.last.prompt_tokens
    for each in (session, again):
        each.keep(1)
        assert len(each.pictures) == 1  # the second image came with the second turn
    again.save(tmp_path / "saved")
    assert chat.open(tmp_path / "saved").turns == session.turns


def test_the_file_is_plain_json(session, tmp_path):
    session.save(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / FILE).read_text())
    assert [turn["question"] for turn in content["turns"]] == ["<ImageHere> What is this?", "<ImageHere> And that?"]
    assert [len(turn["answer_ids"]) for turn in content["turns"]] == [6, 6]
    assert all((tmp_path / "saved" / name).is_file() for name in content["images"])
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == sorted([FILE, *content["images"]])


def test_ids_of_another_tokenizer_are_not_used(loaded, session, tmp_path, caplog):
    session.save(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(content | {"tokenizer": "another"}))
    with caplog.at_level(logging.WARNING, "minigpt4"):
        again = Chat(loaded).open(tmp_path)
    assert "tokenised again" in caplog.text
    assert [turn.answer for turn in again.turns] == [turn.answer for turn in session.turns]
    assert all(turn.answer_ids is None for turn in again.turns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "has format 9; this version reads 1"),
        ({"turns": [{"question": 5, "answer": "a", "answer_ids": None}]}, "question and answer must be texts"),
        ({"turns": [{"question": "q", "answer": "a", "answer_ids": ["x"]}]}, "answer_ids must be whole numbers"),
        ({"turns": [{"question": "q"}]}, "KeyError: 'answer'"),
        ({"images": []}, r"mention 2 image\(s\), but it lists 0"),
        ({"images": None}, "damaged or not a session"),
    ],
)
def test_damaged_files_are_a_message(loaded, session, tmp_path, change, message):
    session.save(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(content | change))
    with pytest.raises(ConversationError, match=rf"{re.escape(str(tmp_path / FILE))}: .*{message}"):
        Chat(loaded).open(tmp_path)


def test_a_folder_without_a_session(loaded, session, tmp_path):
    with pytest.raises(ConversationError, match=r"not found; expected a folder"):
        Chat(loaded).open(tmp_path / "absent")
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ConversationError, match="damaged"):
        Chat(loaded).open(tmp_path)
    session.save(tmp_path)
    for file in tmp_path.glob("*.png"):
        file.unlink()
    with pytest.raises(ImageError, match="image file not found"):
        Chat(loaded).open(tmp_path)
