"""`template: tokenizer`: the chat template that a language model's tokenizer brings along."""

from __future__ import annotations

import logging
from datetime import datetime
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import LlamaTokenizer
from transformers.utils import chat_template_utils

from minigpt4.chat.answer import Answer
from minigpt4.config.sections import ChatConfig
from minigpt4.conversation.dialogue import IMAGE_MARK, Dialogue, Turn
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.conversation.tokenizer import TextTokenizer
from minigpt4.errors import ConversationError, WeightsError
from tests import REFERENCE
from tests.conversation.parts import LLAMA, MARKS, byte_tokenizer, dialogue, encoder, supervised, text_of

pytestmark = pytest.mark.slow

CASES = REFERENCE.parent / "cases"


def read_case(name: str) -> str:
    return (CASES / name / "template.jinja").read_text().rstrip("\n")


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
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + (EACH + "<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|stop|>\n" + DONE)
    + "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
PHI3 = EACH + "<|{{ m.role }}|>\n{{ m.content }}<|eot|>\n" + DONE
PHI3 += "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}"
    + EACH
    + "{% if loop.first and system %}{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
    + "{% else %}{% set text = m.content %}{% endif %}"
    + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}"
    + "{% else %}{{ ' ' + text | trim + ' ' + eos_token }}{% endif %}"
    + DONE
)
MISTRAL_V3 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}{{ bos_token }}"
    + EACH
    + "{% if m.role == 'user' %}[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    + "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}"
    + DONE
)
VICUNA = (
    "{{ bos_token }}A chat. "
    + EACH
    + "{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}"
    + DONE
    + "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
DATED = CHATML.replace("You are kind.", "Today is {{ strftime_now('%d %b %Y') }}.")
GOOD = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "ignores system": IGNORES_SYSTEM,
    "gemma": GEMMA,
    "phi3": PHI3,
    "llama2": LLAMA2,
    "mistral v0.3": MISTRAL_V3,
    "vicuna 1.5": VICUNA,
    "case 20": read_case("20_blank_before_the_answer"),
}
HAS_SYSTEM = {"chatml", "phi3", "llama2", "llama3"}
TURNS = [("What is it?", "A bird 🦜."), ("Is it\nred?", "Yes."), ("Where?", "Here.")]


def tokenizer_with(template: str) -> TextTokenizer:
    return byte_tokenizer(template, bos="<s>", eos="</s>")


def rendered(tokenizer: TextTokenizer, turns, *, prompt: bool = False) -> list[int]:
    """Return what transformers itself makes of the turns."""
    messages = [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    messages = [m for m in messages if m["content"] is not None]
    text = tokenizer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return tokenizer.tokenizer(text, add_special_tokens=False).input_ids


def messages(found: Dialogue) -> list[dict[str, str]]:
    system = [("system", found.system)] if found.system else []
    turns = [m for turn in found.turns for m in (("user", turn.question), ("assistant", turn.answer))]
    return [{"role": role, "content": content} for role, content in system + turns if content is not None]


ODD = st.sampled_from(["</s>", "<s>", "<|im_end|>", "[INST]", "\n", "  ", "🦜", "é", "{{ x }}", "<b>", "&", "'", "###"])
texts = st.lists(ODD | st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=5), max_size=5).map(
    "".join
)
questions = st.tuples(st.sampled_from(["", "", IMAGE_MARK + " ", " " + IMAGE_MARK, "\n"]), texts).map("".join)
answers = st.tuples(st.sampled_from(["", " ", "\n"]), st.just("A"), texts).map("".join)
dialogues = st.lists(st.tuples(questions, answers), min_size=1, max_size=4)


@cache
def byte_encoder(name: str, special: bool) -> ConversationEncoder:
    tokenizer = byte_tokenizer(GOOD[name], bos="<s>", eos="</s>", special=special)
    tokenizer.tokenizer.add_special_tokens({"eos_token": "</s>"})
    return encoder(tokenizer, template="tokenizer", max_answer_tokens=9999, max_tokens=99999)


@cache
def llama_encoder(name: str, legacy: bool, marks: str) -> ConversationEncoder:
    llama = LlamaTokenizer.from_pretrained(REFERENCE, local_files_only=True, legacy=legacy)
    if marks:
        llama.add_tokens([AddedToken(mark, rstrip=marks == "greedy", special=True) for mark in MARKS])
    llama.chat_template = GOOD[name]
    return encoder(TextTokenizer(llama), template="tokenizer", max_answer_tokens=9999, max_tokens=99999)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", GOOD)
@settings(max_examples=25, deadline=None)
@given(turns=dialogues, system=st.sampled_from([None, None, "Be brief.", "Be\n\n<kind>."]))
@example(turns=[(f"{IMAGE_MARK} Q </s>", " A\n"), ("\n", "A </s> "), ("Q", "A")], system=None)
def test_rows_and_prompts_are_those_that_transformers_renders(name, special, turns, system):
    found = byte_encoder(name, special)
    tokenizer = found.tokenizer
    if system and name == "llama2":  # it keeps white space between a system text and a question
        turns = [(question.strip() or "Q", answer) for question, answer in turns]
    given_ = dialogue(*turns, system=system if name in HAS_SYSTEM else None)
    images = given_.num_image_marks
    whole: Any = tokenizer.tokenizer.apply_chat_template(messages(given_), tokenize=False)
    ours = text_of(found.encode_dialogue(given_, num_images=images, sample_id="s"), tokenizer)
    behind = whole.replace(IMAGE_MARK, "{image}").removeprefix(ours)
    assert behind in ("\n", "\n</s>" if name == "phi3" else "")  # behind the last end mark nothing is supervised
    for count in range(1, len(turns) + 1):
        asked = dialogue(*turns[: count - 1], (turns[count - 1][0], None), system=given_.system)
        images = asked.num_image_marks
        prompt: Any = tokenizer.tokenizer.apply_chat_template(
            messages(asked), tokenize=False, add_generation_prompt=True
        )
        ours = text_of(found.encode_prompt(asked, num_images=images), tokenizer)
        assert ours == prompt.replace(IMAGE_MARK, "{image}")


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot|>"), ("mistral", "</s>"), ("ignores system", "<|im_end|>")],
)
def test_the_end_mark_is_supervised(name, end):
    tokenizer = tokenizer_with(GOOD[name])
    encoded = encoder(tokenizer, template="tokenizer").encode_dialogue(dialogue(*TURNS), num_images=1, sample_id="s")
    assert [tokenizer.decode(ids, keep_special=True) for ids in supervised(encoded)] == [a + end for _, a in TURNS]


PLAIN = st.lists(
    st.sampled_from(["A", "dog", "the bird", "is", "red", "\n", "\n\n", "  ", "it's", "3.", "🦜", "é"]),
    min_size=1,
    max_size=8,
).map(" ".join)


IDS = [(name, marks) for name in GOOD for marks in ("", "special") if name != "phi3"] + [("phi3", "greedy")]


@pytest.mark.parametrize("legacy", [False, True], ids=["blank at the start", "blank behind every mark"])
@pytest.mark.parametrize(("name", "marks"), IDS)
@settings(max_examples=15, deadline=None)
@given(turns=st.lists(st.tuples(PLAIN, PLAIN.map(lambda text: f"A{text}")), min_size=1, max_size=3))
def test_ids_are_those_of_the_whole_text(name, legacy, marks, turns):
    """SentencePiece tokenizers put a blank in front of a text, so that a segment on its own would have one too many.

    The marks of Phi-3 are greedy: they take the white space behind them.
    """
    found = llama_encoder(name, legacy, marks)
    llama = found.tokenizer.tokenizer
    whole = llama.apply_chat_template(messages(dialogue(*turns)), tokenize=False)
    wanted = llama(whole, add_special_tokens=False).input_ids
    ids = found.encode_dialogue(dialogue(*turns), num_images=0, sample_id="s").input_ids.tolist()
    assert ids == wanted[: len(ids)]


@pytest.mark.parametrize(("name", "wanted"), [("case 20", " A</s>"), ("llama2", " A </s>"), ("gemma", "A<|stop|>")])
def test_the_blank_before_an_answer_is_part_of_it(name, wanted):
    tokenizer = tokenizer_with(GOOD[name])
    found = encoder(tokenizer, template="tokenizer")
    encoded = found.encode_dialogue(dialogue(("Q", " A "), ("R", "A")), num_images=0, sample_id="s")
    texts = [tokenizer.decode(ids, keep_special=True) for ids in supervised(encoded)]
    assert texts == ["  A </s>" if name == "case 20" else wanted, wanted]  # the others strip answers


def test_an_answer_that_was_generated_has_its_blank_already():
    tokenizer = tokenizer_with(GOOD["case 20"])
    found = encoder(tokenizer, template="tokenizer")
    prompt = found.encode_prompt(dialogue(("Q", None)), num_images=0)
    row = found.encode_dialogue(dialogue(("Q", "A")), num_images=0, sample_id="s")
    generated = row.input_ids[len(prompt.input_ids) :].tolist()
    answer = Answer(found, ChatConfig(), end_ids=[tokenizer.eos_id])
    for token in generated:
        answer.add(token)
    assert (answer.text, tokenizer.decode(answer.kept_ids())) == ("A", " A")
    kept = Dialogue((Turn("Q", answer.text, answer_ids=tuple(answer.kept_ids())), Turn("R")))
    written = found.encode_prompt(dialogue(("Q", "A"), ("R", None)), num_images=0)
    assert torch.equal(found.encode_prompt(kept, num_images=0).input_ids, written.input_ids)


def test_system_texts():
    tokenizer = tokenizer_with(CHATML)
    found = encoder(tokenizer, template="tokenizer")
    row = found.encode_dialogue(dialogue(("Q", "A")), num_images=1, sample_id="s")
    assert text_of(row, tokenizer).startswith(
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\n{image} Q"
    )
    row = found.encode_dialogue(dialogue(("Q", "A"), system="Be brief."), num_images=1, sample_id="s")
    assert text_of(row, tokenizer).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{image} Q")
    for template in (MISTRAL, IGNORES_SYSTEM):
        with pytest.raises(ConversationError, match="does not support a system text"):
            encoder(tokenizer_with(template), template="tokenizer", system="Be kind.").encode_dialogue(
                dialogue(("Q", "A")), num_images=0, sample_id="s"
            )


@pytest.mark.parametrize("template", GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("images", [0, 2])
def test_isolated_turns_are_single_turns(template, images):
    tokenizer = tokenizer_with(template)
    row = encoder(tokenizer, template="tokenizer", isolate_turns=True).encode_dialogue(
        dialogue(*TURNS), num_images=images, sample_id="s"
    )
    for n, turn in enumerate(TURNS, start=1):
        single = encoder(tokenizer, template="tokenizer").encode_dialogue(
            dialogue(turn), num_images=images, sample_id="s"
        )
        seen = (row.branch_ids == 0) | (row.branch_ids == n)
        for name in ("input_ids", "labels", "image_mask", "position_ids"):
            assert torch.equal(getattr(row, name)[seen], getattr(single, name)), name


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            read_case("08_template_that_marks_the_last_answer"),
            r"dialogue of 1 turn\(s\) it writes '.*assistant\\n<think>.*' where '.*assistant\\n.*' follows",
        ),
        (
            CHATML.replace("{{ m.content }}", "{% if loop.index0 == 5 %}5: {% endif %}{{ m.content }}"),
            r"dialogue of 3 turn\(s\) it writes '.*assistant\\n5: .*' where '.*assistant\\n.*' follows",
        ),
        (CHATML.replace("m.content", "m.content | e"), r"it writes '.*&lt;Image.*' where '.*<Image.*' follows"),
        (CHATML.replace("m.content", "m.content.lstrip()"), "for a dialogue of 1 turn"),
        (CHATML.replace("You are kind.", "{{ [1, 2, 3] | random }}"), "depends on chance"),
        (DATED.replace("'%d %b %Y'", "format"), "depends on the current date"),
        (CHATML.replace("m.content", "m.content | upper"), "changes, repeats or drops its input"),
        (CHATML.replace("in messages %}", "in messages[-2:] %}"), "changes, repeats or drops"),
        (CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), "changes, repeats or drops"),
        (CHATML.removesuffix(OPEN), "before an answer to generate and .* before a given answer"),
        ("{{ raise_exception('never') }}", "chat template fails: never"),
        (
            EACH
            + "<|im_start|>{{ m.role }}\n{{ m.content }}{% if loop.last %}<|eot|>{% else %}<|im_end|>{% endif %}\n"
            + DONE
            + OPEN,
            "before an answer to generate and .* before a given answer",
        ),
        (
            EACH + "{% if m.role == 'user' %}{{ m.content }}<|stop|>{% else %}{{ m.content }}"
            "{% if loop.last %}<|eot|>{% else %}<|im_end|>{% endif %}{% endif %}" + DONE,
            "ends the last answer with .* and earlier ones with",
        ),
        (None, "has no chat template; set conversation.template to a built-in one"),
    ],
    ids=[
        "case 08",
        "third turn",
        "escapes",
        "strips on one side",
        "random",
        "date in a format that is computed",
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


def test_the_current_date_is_made_constant(monkeypatch, caplog):
    rows = []
    for day in (datetime(2024, 7, 26), datetime(2031, 1, 2)):

        class Clock(datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return day

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        tokenizer = tokenizer_with(DATED)
        with caplog.at_level(logging.INFO):
            rows.append(encoder(tokenizer, template="tokenizer").encode_prompt(dialogue(("Q", None)), num_images=0))
        assert (rows[-1].input_ids.tolist() == rendered(tokenizer, [("Q", None)], prompt=True)) == (day.year == 2024)
    assert torch.equal(rows[0].input_ids, rows[1].input_ids)
    assert "writes the current date: 2024-07-26 is written instead" in caplog.text


def test_a_template_that_rewrites_answers_with_reasoning_is_named(caplog):
    cuts = CHATML.replace("m.content }}<", "m.content.split('</think>')[-1] }}<")
    encoder(tokenizer_with(cuts), template="tokenizer")
    assert "rewrites answers with </think>; they are kept as they are" in caplog.text


def test_tokenizers_are_found_or_named(tmp_path):
    folder = tmp_path / "llm"
    LLAMA.tokenizer.save_pretrained(folder)
    text = "Hello </s> there"
    assert TextTokenizer.from_path(folder).tokenize([(text, False)]) == LLAMA.tokenize([(text, False)])
    assert TextTokenizer.from_path(REFERENCE / "tokenizer.model").tokenize([(text, True)]) == LLAMA.tokenize(
        [(text, True)]
    )
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match=f"{tmp_path}: no usable tokenizer found"):
        TextTokenizer.from_path(tmp_path)


def test_marks_in_the_template_become_ids_and_in_content_stay_text():
    for special in (True, False):
        tokenizer = byte_tokenizer(special=special)
        mark = tokenizer.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert tokenizer.tokenize([("a<|im_end|>", False), ("<|im_end|>", True)]).count(mark) == 1  # type: ignore[arg-type]
        assert mark not in tokenizer.tokenize([("a<|im_", False), ("end|>", False)])
    assert LLAMA.tokenize([("", False)]) == []


def test_a_system_text_that_moves_to_the_last_question_is_refused():
    found = encoder(tokenizer_with(MISTRAL_V3), template="tokenizer")
    with pytest.raises(ConversationError, match="does not support a system text"):
        found.encode_dialogue(dialogue(("Q", "A"), system="Be kind."), num_images=0, sample_id="s")
