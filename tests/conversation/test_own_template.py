"""`template: tokenizer`: the chat template that a language model's tokenizer brings along."""

from __future__ import annotations

import pytest
import torch

from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.errors import ConversationError, WeightsError
from tests import REFERENCE
from tests.conversation.parts import LLAMA, byte_tokenizer, dialogue, encoder, learnt, text_of

EACH = "{% for m in messages %}"
DONE = "{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
CHATML = DEFAULT + EACH + TURN + DONE + OPEN
LLAMA3 = (
    EACH + "{% if loop.first %}<s>{% endif %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot|>" + DONE
) + "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
MISTRAL = (
    "<s>"
    + EACH
    + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}{{ m.content }}</s>"
    + "{% else %}{{ raise_exception('no system role') }}{% endif %}"
    + DONE
)
IGNORES_SYSTEM = EACH + "{% if m.role != 'system' %}" + TURN + "{% endif %}" + DONE + OPEN
GOOD = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "ignores system": IGNORES_SYSTEM}
TURNS = [("What is it?", "A bird 🦜."), ("Is it\nred?", "Yes."), ("Where?", "Here.")]


def tokenizer_with(template: str) -> TextTokenizer:
    return byte_tokenizer(template, bos="<s>", eos="</s>")


def rendered(tokenizer: TextTokenizer, turns, *, prompt: bool = False) -> list[int]:
    """Return what transformers itself makes of the turns."""
    messages = [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    messages = [m for m in messages if m["content"] is not None]
    text = tokenizer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return tokenizer.tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("template", GOOD.values(), ids=GOOD)
def test_rows_are_those_that_transformers_renders(template):
    tokenizer = tokenizer_with(template)
    found = encoder(tokenizer, template="tokenizer")
    for count in (1, 2, 3):
        ids = found.encode(dialogue(*TURNS[:count]), num_images=0, sample_id="s").input_ids.tolist()
        whole = rendered(tokenizer, TURNS[:count])
        assert whole[: len(ids)] == ids
        assert tokenizer.decode(whole[len(ids) :]).strip() == ""  # a line break behind the last end mark is not learnt
        asked = [*TURNS[: count - 1], (TURNS[count - 1][0], None)]
        prompt = found.encode_prompt(dialogue(*asked), num_images=0).input_ids.tolist()
        assert prompt == rendered(tokenizer, asked, prompt=True)
        assert ids.count(tokenizer.bos_id) == (1 if "<s>" in template else 0)


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot|>"), ("mistral", "</s>"), ("ignores system", "<|im_end|>")],
)
def test_the_end_mark_is_learnt(name, end):
    tokenizer = tokenizer_with(GOOD[name])
    encoded = encoder(tokenizer, template="tokenizer").encode(dialogue(*TURNS), num_images=1, sample_id="s")
    assert [tokenizer.decode(ids, keep_special=True) for ids in learnt(encoded)] == [a + end for _, a in TURNS]


def test_a_template_that_strips_content_keeps_ours_as_it_is():
    tokenizer = tokenizer_with(LLAMA3)
    encoded = encoder(tokenizer, template="tokenizer").encode(dialogue(("Q", " A ")), num_images=0, sample_id="s")
    assert [tokenizer.decode(ids) for ids in learnt(encoded)] == [" A "]


def test_system_texts():
    tokenizer = tokenizer_with(CHATML)
    found = encoder(tokenizer, template="tokenizer")
    row = found.encode(dialogue(("Q", "A")), num_images=1, sample_id="s")
    assert text_of(row, tokenizer).startswith(
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\n{image} Q"
    )
    row = found.encode(dialogue(("Q", "A"), system="Be brief."), num_images=1, sample_id="s")
    assert text_of(row, tokenizer).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{image} Q")
    for template in (MISTRAL, IGNORES_SYSTEM):
        with pytest.raises(ConversationError, match="has no place for a system text"):
            encoder(tokenizer_with(template), template="tokenizer", system="Be kind.").encode(
                dialogue(("Q", "A")), num_images=0, sample_id="s"
            )


@pytest.mark.parametrize("template", GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("images", [0, 2])
def test_isolated_turns_are_single_turns(template, images):
    tokenizer = tokenizer_with(template)
    row = encoder(tokenizer, template="tokenizer", isolate_turns=True).encode(
        dialogue(*TURNS), num_images=images, sample_id="s"
    )
    for n, turn in enumerate(TURNS, start=1):
        single = encoder(tokenizer, template="tokenizer").encode(dialogue(turn), num_images=images, sample_id="s")
        seen = (row.branch_ids == 0) | (row.branch_ids == n)
        for name in ("input_ids", "labels", "image_mask", "position_ids"):
            assert torch.equal(getattr(row, name)[seen], getattr(single, name)), name


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("m.content", "m.content | upper"), "alters, repeats or drops what it is given"),
        (CHATML.replace("in messages %}", "in messages[-2:] %}"), "alters, repeats or drops"),
        (CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), "alters, repeats or drops"),
        (CHATML.removesuffix(OPEN), "before an answer to come and .* before a given one"),
        ("{{ raise_exception('never') }}", "chat template fails: never"),
        (
            EACH
            + "<|im_start|>{{ m.role }}\n{{ m.content }}{% if loop.last %}<|eot|>{% else %}<|im_end|>{% endif %}\n"
            + DONE
            + OPEN,
            "before an answer to come and .* before a given one",
        ),
        (
            EACH + "{% if m.role == 'user' %}{{ m.content }}<|stop|>{% else %}{{ m.content }}"
            "{% if loop.last %}<|eot|>{% else %}<|im_end|>{% endif %}{% endif %}" + DONE,
            "ends answers with .* by place",
        ),
        (None, "has no chat template; set conversation.template to a built-in one"),
    ],
    ids=[
        "upper case",
        "drops turns",
        "repeats",
        "no generation prompt",
        "fails",
        "mark by place",
        "answer mark by place",
        "none",
    ],
)
def test_templates_that_cannot_be_trusted_are_refused(template, message):
    with pytest.raises(ConversationError, match=message):
        encoder(byte_tokenizer(template, bos="<s>", eos="</s>"), template="tokenizer")


def test_tokenizers_are_found_or_named(tmp_path):
    folder = tmp_path / "llm"
    LLAMA.tokenizer.save_pretrained(folder)
    text = "Hello </s> there"
    assert TextTokenizer.from_path(folder).encode([(text, False)]) == LLAMA.encode([(text, False)])
    assert TextTokenizer.from_path(REFERENCE / "tokenizer.model").encode([(text, True)]) == LLAMA.encode([(text, True)])
    with pytest.raises(WeightsError, match=f"{tmp_path}: no usable tokenizer there"):
        TextTokenizer.from_path(tmp_path)


def test_marks_in_the_template_become_ids_and_in_content_stay_text():
    for special in (True, False):
        tokenizer = byte_tokenizer(special=special)
        mark = tokenizer.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert tokenizer.encode([("a<|im_end|>", False), ("<|im_end|>", True)]).count(mark) == 1
        assert mark not in tokenizer.encode([("a<|im_", False), ("end|>", False)])
    assert LLAMA.encode([("", False)]) == []
