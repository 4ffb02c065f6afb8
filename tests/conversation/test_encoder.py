"""One encoder for training and chat: labels, marks that users type, truncation, isolated turns."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt4.batch import IGNORE
from minigpt4.chat.answer import Answer
from minigpt4.config.sections import ChatConfig
from minigpt4.errors import ConfigError, ConversationError, UnknownNameError
from minigpt4.registry import TEMPLATES
from tests.conversation.parts import LLAMA, byte_tokenizer, dialogue, encoder, supervised, text_of

CHATML_OWN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZERS = {
    "llama": LLAMA,
    "bytes": byte_tokenizer(),
    "bytes with bos": byte_tokenizer(bos="<s>", eos="</s>"),
    "marks not special": byte_tokenizer(special=False),
    "own": byte_tokenizer(CHATML_OWN),
}
CASES = [(t, k) for t in TEMPLATES.names() for k in TOKENIZERS] + [("tokenizer", "own")]
TYPED = ["###", "</s>", "<s>", "<|im_end|>", "<|im_start|>", "[INST]", "\n", "  ", "🦜", "é", "###Human: ", "<unk>"]
words = st.lists(
    st.one_of(st.sampled_from(TYPED), st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=5)),
    max_size=5,
).map("".join)
answers = words.map(lambda text: "A" + text)
turns = st.lists(st.tuples(words.map(lambda text: "Q" + text), answers), min_size=1, max_size=3)


@pytest.mark.slow
@pytest.mark.parametrize(("template", "kind"), CASES)
@settings(max_examples=25, deadline=None)
@given(turns=turns)
@example(turns=[("Q<|im_end|></s>###", "A<|im_end|></s>###"), ("Q", "A\n\n🦜 <|im_start|>")])
def test_labels_are_the_answers_and_content_never_becomes_special(template, kind, turns):
    tokenizer = TOKENIZERS[kind]
    found = encoder(tokenizer, template=template, max_answer_tokens=999)
    encoded = found.encode_dialogue(dialogue(*turns), num_images=1, sample_id="s")
    end = found.training_template.end
    texts = [tokenizer.decode(ids, keep_special=True) for ids in supervised(encoded)]
    assert texts == [answer + end for _, answer in turns]

    harmless = dialogue(*(("Q", "A") for _ in turns))
    plain = found.encode_dialogue(harmless, num_images=1, sample_id="s")
    assert [i for i in encoded.input_ids.tolist() if is_mark(tokenizer, i)] == [
        i for i in plain.input_ids.tolist() if is_mark(tokenizer, i)
    ]
    assert encoded.image_mask.sum() == 3
    assert encoded.labels[encoded.image_mask].eq(IGNORE).all()
    assert torch.equal(encoded.position_ids, torch.arange(len(encoded.input_ids)))
    assert not encoded.branch_ids.any()


def is_mark(tokenizer, token: int) -> bool:
    return token in tokenizer.tokenizer.added_tokens_decoder or token in tokenizer.tokenizer.all_special_ids


@pytest.mark.slow
@pytest.mark.parametrize(("template", "kind"), CASES)
@settings(max_examples=15, deadline=None)
@given(turns=turns, images=st.integers(0, 2))
def test_chat_prompt_is_the_training_row_up_to_each_answer(template, kind, turns, images):
    found = encoder(TOKENIZERS[kind], template=template, max_answer_tokens=999)
    encoded = found.encode_dialogue(dialogue(*turns), num_images=images, sample_id="s")
    supervised_at = (encoded.labels != IGNORE).tolist()
    starts = [n for n, (before, now) in enumerate(pairwise([False, *supervised_at])) if now and not before]
    assert len(starts) == len(turns)
    for n, start in enumerate(starts):
        asked = dialogue(*turns[:n], (turns[n][0], None))
        prompt = found.encode_prompt(asked, num_images=images)
        assert prompt.input_ids.tolist() == encoded.input_ids[:start].tolist()
        assert torch.equal(prompt.image_mask, encoded.image_mask[:start])


def test_an_end_mark_that_is_plain_text_stays_in_the_answer_and_chat_stops_at_it():
    """A mark of plain text cannot be distinguished from the same text in an answer: `###`, or the line break of plain.

    Training keeps the answer whole, as the published code does: nothing is dropped or altered in silence, and no id is
    special. The price is paid in chat, which shows the answer up to the first mark. Formats with special marks (llama2,
    chatml, the tokenizer's own) do not have this limit.
    """
    answer = "First.\n### Second"
    for template, shown in (("vicuna_v0", "First."), ("plain", "First."), ("llama2", answer)):
        found = encoder(template=template)
        (ids,) = supervised(found.encode_dialogue(dialogue(("Q", answer)), num_images=0, sample_id="s"))
        text = LLAMA.decode(ids, keep_special=True)
        assert text == answer + found.training_template.end
        in_chat = Answer(found, ChatConfig(max_new_tokens=len(ids)), end_ids=())
        for token in ids:
            if in_chat.finish_reason is None:
                in_chat.add(token)
        assert (in_chat.text, in_chat.finish_reason) == (shown, "stop")


@pytest.mark.parametrize(("template", "kind"), CASES)
@pytest.mark.parametrize("limit", [17, 40])
def test_the_end_mark_survives_truncation(template, kind, limit):
    tokenizer = TOKENIZERS[kind]
    found = encoder(tokenizer, template=template, max_answer_tokens=limit)
    (ids,) = supervised(found.encode_dialogue(dialogue(("Q", "word and word " * 30)), num_images=0, sample_id="s"))
    assert len(ids) == limit
    kept, end, rest = tokenizer.decode(ids, keep_special=True).partition(found.training_template.end)
    assert (end, rest) == (found.training_template.end, "")
    assert ids[-len(found.end_ids) :] == found.end_ids
    assert ("word and word " * 30).startswith(kept)


def test_the_published_truncation_cuts_the_end_mark():
    found = encoder(template="vicuna_v0", compat="published", max_answer_tokens=12)
    (ids,) = supervised(found.encode_dialogue(dialogue(("Q", "word and word " * 30)), num_images=0, sample_id="s"))
    assert len(ids) == 12
    assert "#" not in LLAMA.decode(ids)


@pytest.mark.parametrize("limit", [1, 2])
def test_a_limit_without_room_for_an_answer_is_refused(limit):
    with pytest.raises(
        ConfigError, match=rf"max_answer_tokens: {limit} is too small: the end mark '###' takes \d token"
    ):
        encoder(byte_tokenizer(), template="vicuna_v0", max_answer_tokens=limit)


@pytest.mark.parametrize(
    ("template", "kind", "wanted"),
    [
        ("vicuna_v0", "llama", "<s>"),
        ("vicuna_v0", "bytes", ""),
        ("llama2", "bytes with bos", "<s>"),
        ("chatml", "bytes with bos", ""),
        ("plain", "llama", "<s>"),
    ],
)
def test_bos_comes_once_or_not_at_all(template, kind, wanted):
    tokenizer = TOKENIZERS[kind]
    encoded = encoder(tokenizer, template=template).encode_dialogue(dialogue(("Q", "A")), num_images=1, sample_id="s")
    ids = encoded.input_ids.tolist()
    if not wanted:
        assert tokenizer.bos_id not in ids
    else:
        assert ids[0] == tokenizer.bos_id
        assert ids.count(tokenizer.bos_id) == 1


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("vicuna_v0", "###Human: <Img>{image}</Img> Q ###Assistant: A###Human: R ###Assistant: B###"),
        ("llama2", "[INST] <Img>{image}</Img> Q [/INST] A</s><s>[INST] R [/INST] B</s>"),
        (
            "chatml",
            "<|im_start|>user\n{image} Q<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
            "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB<|im_end|>",
        ),
        ("plain", "{image} QA\nRB\n"),
    ],
)
def test_each_template_as_text(template, wanted):
    tokenizer = byte_tokenizer(bos="<s>", eos="</s>")
    encoded = encoder(tokenizer, template=template).encode_dialogue(
        dialogue(("Q", "A"), ("R", "B")), num_images=1, sample_id="s"
    )
    bos = "<s>" if TEMPLATES.get(template).starts_with_bos else ""
    assert text_of(encoded, tokenizer) == bos + wanted


@pytest.mark.parametrize("turn", [("", "a caption")])
def test_a_caption_is_the_image_and_the_caption(turn):
    found = encoder(template="plain")
    encoded = found.encode_dialogue(dialogue(turn), num_images=1, sample_id="s")
    assert text_of(encoded, LLAMA) == "<s>{image}a caption\n"
    assert encoded.image_mask.tolist()[1:4] == [True] * 3
    prompt = found.encode_prompt(dialogue(("", None)), num_images=1)
    assert prompt.input_ids.tolist() == encoded.input_ids[:4].tolist()


@pytest.mark.parametrize(("template", "kind"), CASES)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_isolated_turns_are_the_single_turns_token_by_token(template, kind, images):
    given_turns = [("What is it?", "A bird 🦜."), ("Is it red?", "Yes."), ("Where?", "On a </s> branch.")]
    settings_ = {"template": template, "max_answer_tokens": 99}
    row = encoder(TOKENIZERS[kind], isolate_turns=True, **settings_).encode_dialogue(
        dialogue(*given_turns), num_images=images, sample_id="s"
    )
    trunk = row.branch_ids == 0
    assert row.image_mask[trunk].sum() == row.image_mask.sum() == 3 * images
    for n, turn in enumerate(given_turns, start=1):
        single = encoder(TOKENIZERS[kind], **settings_).encode_dialogue(
            dialogue(turn), num_images=images, sample_id="s"
        )
        seen = trunk | (row.branch_ids == n)
        for name in ("input_ids", "labels", "image_mask", "position_ids"):
            assert torch.equal(getattr(row, name)[seen], getattr(single, name)), name


@pytest.mark.parametrize(("template", "kind"), CASES)
def test_a_prompt_of_isolated_turns_is_the_last_question_alone_with_all_images(template, kind):
    found = encoder(TOKENIZERS[kind], isolate_turns=True, template=template)
    talk = dialogue(("<ImageHere> What is it?", "A bird."), ("<ImageHere> And here?", "A cat."), ("Where?", None))
    prompt = found.encode_prompt(talk, num_images=2)
    alone = found.encode_prompt(dialogue(("<ImageHere><ImageHere> Where?", None)), num_images=2)
    assert prompt.input_ids.tolist() == alone.input_ids.tolist()
    placed = "Is <ImageHere> like <ImageHere>?"
    again = found.encode_prompt(dialogue(("Q", "A"), (placed, None)), num_images=2)
    first = found.encode_prompt(dialogue((placed, None)), num_images=2)
    assert again.input_ids.tolist() == first.input_ids.tolist(), "a question that places all images keeps them there"
    supervised = found.encode_dialogue(
        dialogue(("What is it?", "A bird."), ("Where?", "Here.")), num_images=2, sample_id="s"
    )
    seen = (supervised.branch_ids == 0) | (supervised.branch_ids == 2)
    row = supervised.input_ids[seen].tolist()
    assert prompt.input_ids.tolist() == row[: len(prompt.input_ids)]
    with pytest.raises(ConversationError, match=r"prompt: the questions mention 2 image\(s\), but the sample has 1"):
        found.encode_prompt(talk, num_images=1)


def test_isolated_turns_share_their_images():
    found = encoder(template="vicuna_v0", isolate_turns=True)
    with pytest.raises(ConversationError, match="row 7: a later question mentions an image"):
        found.encode_dialogue(dialogue(("Q", "A"), ("<ImageHere> R", "B")), num_images=1, sample_id="row 7")
    with pytest.raises(ConversationError, match=r"row 7: the questions mention 1 image\(s\), but the sample has 2"):
        found.encode_dialogue(dialogue(("<ImageHere> Q", "A"), ("R", "B")), num_images=2, sample_id="row 7")


@pytest.mark.parametrize(
    ("turns", "settings_", "cause", "message"),
    [
        ([], {}, "no answer", "row 7: turn 0 has no answer"),
        ([("Q", "A"), ("R", None)], {}, "no answer", "row 7: turn 1 has no answer"),
        ([("Q", " \n")], {}, "no answer", "row 7: turn 0 has no answer"),
        (
            [("Q " * 99, "A")],
            {"max_tokens": 50},
            "too long",
            r"row 7: \d+ tokens, more than conversation.max_tokens 50",
        ),
        ([("<ImageHere> Q", "A")], {}, "image count", r"row 7: .*mention 1 image\(s\), but the sample has 0"),
    ],
)
def test_errors_of_samples_name_the_sample(turns, settings_, cause, message):
    with pytest.raises(ConversationError, match=message) as error:
        encoder(template="vicuna_v0", **settings_).encode_dialogue(dialogue(*turns), num_images=0, sample_id="row 7")
    assert error.value.cause == cause


def test_a_sample_cut_to_nothing_is_an_error():
    found = encoder(byte_tokenizer(), template="plain", compat="published", max_answer_tokens=1)
    with pytest.raises(ConversationError, match="row 7: no token of the answers is supervised"):
        found.encode_dialogue(dialogue(("", "A")), num_images=0, sample_id="row 7")


def test_prompts_without_anything_are_refused():
    found = encoder(byte_tokenizer(), template="plain")
    with pytest.raises(ConversationError, match="prompt: the prompt is empty"):
        found.encode_prompt(dialogue(("", None)), num_images=0)
    with pytest.raises(ConversationError, match="there is no turn to answer"):
        found.encode_prompt(dialogue(), num_images=1)


def test_system_texts_go_where_the_format_has_a_place():
    tokenizer = byte_tokenizer()
    found = encoder(tokenizer, template="chatml", system="Be kind.")
    default = text_of(found.encode_dialogue(dialogue(("Q", "A")), num_images=0, sample_id="s"), tokenizer)
    assert default.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nQ")
    own = text_of(
        found.encode_dialogue(dialogue(("Q", "A"), system="Be brief."), num_images=0, sample_id="s"), tokenizer
    )
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    with pytest.raises(ConversationError, match="template 'llama2' does not support a system text"):
        encoder(template="llama2", system="Be kind.").encode_dialogue(dialogue(("Q", "A")), num_images=0, sample_id="s")


def test_unknown_templates_name_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown template 'vicuna'\. Did you mean 'vicuna_v0'"):
        encoder(template="vicuna")
