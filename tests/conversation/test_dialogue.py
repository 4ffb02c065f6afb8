"""Image marks: every spelling becomes one, and counts must agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4.conversation.dialogue import IMAGE_MARK, normalise_marks, place_images, read_prompts
from minigpt4.errors import ConversationError, DataError
from tests.conversation.parts import dialogue


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<Img><ImageHere></Img> Describe.", f"{IMAGE_MARK} Describe."),
        ("<Img> <ImageHere> </Img> Describe.", f"{IMAGE_MARK} Describe."),
        ("<image>\nDescribe.", f"{IMAGE_MARK} Describe."),
        ("Describe.\n<image>", f"Describe.{IMAGE_MARK}"),
        ("Compare <image> and <image>.", f"Compare {IMAGE_MARK} and {IMAGE_MARK}."),
        ("An <img> tag.", "An <img> tag."),
    ],
)
def test_every_spelling_becomes_one(text, wanted):
    assert normalise_marks(text) == wanted


@given(st.lists(st.sampled_from(["<Img><ImageHere></Img>", "<image>\n", "\n<image>", "<image>", "a", " ", "\n"])))
def test_no_mark_is_lost_and_normalising_twice_changes_nothing(pieces):
    text = "".join(pieces)
    found = normalise_marks(text)
    assert found.count(IMAGE_MARK) == text.count("<image>") + text.count("<ImageHere>")
    assert normalise_marks(found) == found


@pytest.mark.parametrize("images", [0, 1, 3])
def test_images_without_marks_go_first(images):
    found = place_images(dialogue(("Q", "A"), ("R", "B")), images, "s")
    assert found.num_image_marks == images
    assert found.turns[0].question == (IMAGE_MARK * images + " Q" if images else "Q")
    assert found.turns[1].question == "R"
    assert place_images(dialogue(("", "A")), images, "s").turns[0].question == IMAGE_MARK * images


def test_marks_that_agree_stay_and_others_are_named():
    given_ = dialogue((f"Q {IMAGE_MARK}", "A"), (f"{IMAGE_MARK} R", "B"))
    assert place_images(given_, 2, "s") is given_
    for images in (0, 1, 3):
        message = rf"a.jsonl:3: the questions mention 2 image\(s\), but the sample has {images}"
        with pytest.raises(ConversationError, match=message) as error:
            place_images(given_, images, "a.jsonl:3")
        assert error.value.cause == "image count"


def test_prompt_files(tmp_path):
    assert all(line.count(IMAGE_MARK) == 1 for line in read_prompts("alignment"))
    assert read_prompts("") == [""]
    file = tmp_path / "mine.txt"
    file.write_bytes(b"\xef\xbb\xbf<image>\n\n  What is this?  \n")
    assert read_prompts(str(file)) == [IMAGE_MARK, "What is this?"]
    for content, message in ((b"\n \n", "has no prompt"), (b"\xff\xfe\x00", "cannot be read as UTF-8")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_prompts(str(file))
    with pytest.raises(DataError, match=r"prompt file 'nonesuch' not found; .*alignment"):
        read_prompts("nonesuch")
