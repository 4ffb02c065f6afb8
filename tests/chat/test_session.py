"""Sessions and the engine: answers as a whole, as a stream, in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minigpt4.chat.decoding.decoder import Decoder
from minigpt4.chat.engine import Engine, Prompt
from minigpt4.chat.session import Chat
from minigpt4.checkpoints.assemble import load_model
from minigpt4.config.sections import ChatConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.errors import ContextLengthError, ConversationError, DecodingError, ImageError
from tests.chat.conftest import ids_of, image, stream, teach

QUESTIONS = ["What is this?", "Why?", "Tell me everything that you can see in this picture, please."]


def byte_pieces(text: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in text.encode()]


def prompts(engine: Engine) -> list[Prompt]:
    """Return prompts of unlike lengths with no, one and two images."""
    pictures = [image("red"), image("blue")]
    return [
        Prompt(Dialogue((Turn(question),)), engine.query_features(pictures[:count]))
        for count, question in enumerate(QUESTIONS)
    ]


def test_a_batch_answers_as_one_by_one_and_as_a_stream(loaded):
    engine, settings = Engine(loaded), ChatConfig(max_new_tokens=12)
    asked = prompts(engine)
    together = engine.answer(asked, settings)
    assert len(set(together)) > 1
    assert together == [engine.answer([prompt], settings)[0] for prompt in asked]
    assert together == ["".join(stream(engine, prompt, settings)) for prompt in asked]
    assert engine.answer([], settings) == []


@pytest.mark.mini
def test_a_batch_of_the_mini_model_answers_as_one_by_one():
    loaded = load_model("mini", ["model.language_model.dtype=float32"], device="cpu")
    engine = Engine(loaded)
    asked = prompts(engine)
    for row, found in zip(asked, watched(engine, asked), strict=True):
        (wanted,) = watched(engine, [row])
        for (token, logits), (best, alone) in zip(found, wanted, strict=False):
            torch.testing.assert_close(logits, alone, atol=1e-3, rtol=0)
            first, second = alone.topk(2).values
            if token != best:
                assert first - second <= 1e-3
                break  # from here on they answer differently
        else:
            assert len(found) == len(wanted)


def watched(engine: Engine, asked: list[Prompt]) -> list[list[tuple[int, torch.Tensor]]]:
    """Decode together and return, for each prompt, its tokens and the logits (V,) that each was chosen from."""
    settings, llm = ChatConfig(max_new_tokens=8), engine.loaded.model.language_model
    answers, passes = [engine.new_answer(settings) for _ in asked], []
    hook = llm.model.get_output_embeddings().register_forward_hook(lambda m, a, out: passes.append(out[:, -1].clone()))
    decoder = Decoder(llm)
    decoder.join(answers, [engine.embeds(prompt, settings.max_new_tokens) for prompt in asked])
    rows = [answers]
    while not decoder.is_idle:
        decoder.step()
        rows.append(list(decoder.answers))
    hook.remove()
    seen: dict[int, list[torch.Tensor]] = {id(answer): [] for answer in answers}
    for logits, members in zip(passes, rows, strict=True):
        for answer, row in zip(members, logits, strict=True):
            seen[id(answer)].append(row)
    return [list(zip(answer.ids, seen[id(answer)], strict=True)) for answer in answers]


def test_rows_end_at_end_of_sequence_on_steps_of_their_own(loaded):
    engine, settings = Engine(loaded), ChatConfig(max_new_tokens=12)
    asked = prompts(engine)
    rows = [answer.ids for answer in engine.decode(asked, settings)]
    end = rows[0][4]
    loaded.conversation.tokenizer.eos_id = end
    kept = [row[: row.index(end)] if end in row else row for row in rows]
    wanted = [loaded.conversation.tokenizer.decode(row, keep_special=True).strip() for row in kept]
    answers = engine.decode(asked, settings)
    assert [answer.text for answer in answers] == wanted
    assert len(answers[0].ids) == rows[0].index(end) + 1
    assert [answer.finish_reason for answer in answers] == ["stop" if end in row else "length" for row in rows]


def test_an_end_mark_split_over_tokens_stops_and_never_shows(loaded):
    teach(loaded, ids_of(loaded, *byte_pieces("A b!"), "##", "#", "s"))
    session = Chat(loaded, ChatConfig(max_new_tokens=20)).session()
    seen = list(session.stream("What?"))
    assert "".join(seen) == "A b!"
    assert not any("#" in piece for piece in seen)
    assert Chat(loaded, ChatConfig(max_new_tokens=20)).session().ask("What?") == "A b!"


def test_the_start_of_an_end_mark_that_does_not_become_one_is_text(loaded):
    teach(loaded, ids_of(loaded, *byte_pieces("C"), "##", *byte_pieces("!"), loaded.conversation.tokenizer.eos_id))
    assert Chat(loaded, ChatConfig(max_new_tokens=20)).session().ask("What?") == "C##!"


def test_blanks_before_the_end_mark_do_not_show(loaded):
    teach(loaded, ids_of(loaded, *byte_pieces("Hi \n"), "##", "#"))
    settings = ChatConfig(max_new_tokens=20)
    assert "".join(Chat(loaded, settings).session().stream("What?")) == "Hi"
    engine = Engine(loaded)
    assert engine.answer([Prompt(Dialogue((Turn("What?"),)))], settings) == ["Hi"]


def test_a_character_of_several_tokens_is_never_shown_in_pieces(loaded):
    teach(loaded, ids_of(loaded, *byte_pieces("é🦜"), loaded.conversation.tokenizer.eos_id))
    seen = list(Chat(loaded, ChatConfig(max_new_tokens=20)).session().stream("What?"))
    assert seen == ["é", "🦜"]


def test_turns_are_kept_and_shape_the_next_prompt(loaded):
    session = Chat(loaded).session([image("red")])
    first = session.ask("What is this?")
    assert [(turn.question, turn.answer) for turn in session.turns] == [("<ImageHere> What is this?", first)]
    session.ask("And why?")
    assert [turn.question for turn in session.turns] == ["<ImageHere> What is this?", "And why?"]


def test_a_later_answer_is_that_of_the_whole_dialogue_at_once(loaded):
    chat = Chat(loaded, ChatConfig(max_new_tokens=8))
    session = chat.session([image("red")])
    session.ask("What is this?")
    second = session.ask("And why?")
    whole = Dialogue((session.turns[0], Turn("And why?")))
    assert "".join(stream(chat.engine, Prompt(whole, session.features), chat.settings)) == second


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_prompt_of_a_session_is_that_of_training(load_with, images):
    for template, question in (("vicuna_v0", "What is it?"), ("plain", ""), ("llama2", "What is it?")):
        loaded = load_with(template=template)
        session = Chat(loaded).session([image("red")] * images)
        if not images and not question:
            continue
        session.ask(question)
        asked = Dialogue((Turn(session.turns[0].question),))
        prompt = loaded.conversation.encode_prompt(asked, num_images=images).input_ids.tolist()
        assert session.last.prompt_tokens == len(prompt)
        row = loaded.conversation.encode_dialogue(
            Dialogue((Turn(question, "A bird."),)), num_images=images, sample_id="s"
        )
        assert row.input_ids[: len(prompt)].tolist() == prompt
        assert (row.labels[: len(prompt)] == -100).all()
        assert row.labels[len(prompt)] != -100


@pytest.mark.parametrize("kind", [str, Path, bytes, Image.Image])
def test_one_image_need_not_be_put_in_a_list(loaded, tmp_path, kind):
    file = tmp_path / "red.png"
    image("red").save(file)
    given = {str: str(file), Path: file, bytes: file.read_bytes(), Image.Image: image("red")}[kind]
    listed = Chat(loaded).session([image("red")]).ask("What is this?")
    assert Chat(loaded).session(given).ask("What is this?") == listed
    assert Chat(loaded).session().ask("What is this?", images=given) == listed


def test_images_may_stand_where_the_question_puts_them(loaded):
    session = Chat(loaded).session([image("red"), image("blue")])
    session.ask("Is <ImageHere> like <ImageHere>?")
    assert session.turns[0].question == "Is <ImageHere> like <ImageHere>?"
    with pytest.raises(ConversationError, match=r"mention 1 image\(s\), but the sample has 2"):
        Chat(loaded).session([image("red"), image("blue")]).ask("What is <ImageHere>?")
    with pytest.raises(ConversationError, match=r"mention 1 image\(s\), but the sample has 0"):
        Chat(loaded).session().ask("What is <ImageHere>?")


def test_images_count_in_their_order(loaded):
    engine = Engine(loaded)
    torch.manual_seed(0)
    one, two = torch.randn(2, 3, 28, 28)  # noise: plain colours would look alike
    there, back = engine.query_features([one, two]), engine.query_features([two, one])
    torch.testing.assert_close(there, back.flip(0), atol=1e-5, rtol=1e-5)
    embeds = [engine.embeds(Prompt(Dialogue((Turn("Q"),)), f), 5) for f in (there, back)]
    assert embeds[0].shape == embeds[1].shape
    assert not torch.equal(*embeds)


def test_settings_of_a_turn_override_those_of_the_chat(loaded):
    chat = Chat(loaded)
    assert chat.settings.max_new_tokens == 5  # of the config
    warm: dict[str, Any] = {"temperature": 2.0, "max_new_tokens": 10}
    answers = [chat.session().ask("Why?", seed=seed, **warm) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_prompt_longer_than_the_context(loaded):
    session = Chat(loaded).session([image("red")])
    with pytest.raises(
        ContextLengthError, match=r"prompt has \d+ tokens .* may have 600, .* reads 512: ask a shorter question"
    ):
        session.ask("Why?", max_new_tokens=600)
    assert session.turns == ()
    assert isinstance(session.ask("Why?"), str)  # the session continues


def test_text_alone_is_what_the_bare_language_model_says(loaded):
    prompt = Prompt(Dialogue((Turn("Where is the bus going?"),)))
    ids = loaded.conversation.encode_prompt(prompt.dialogue, num_images=0).input_ids
    bare = loaded.model.language_model.model.generate(ids.unsqueeze(0), max_new_tokens=20, do_sample=False)
    (answer,) = Engine(loaded).decode([prompt], ChatConfig(max_new_tokens=20))
    assert answer.ids == bare[0, len(ids) :].tolist()
    session = Chat(loaded, ChatConfig(max_new_tokens=20)).session()
    assert session.ask("Where is the bus going?") == answer.text


def test_logits_that_are_not_finite_end_in_a_message(loaded):
    with torch.no_grad():
        loaded.model.language_model.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DecodingError, match="not finite"):
        Chat(loaded).session().ask("Why?")


def test_a_file_that_is_not_an_image(loaded, tmp_path):
    file = tmp_path / "x.png"
    file.write_text("words")
    with pytest.raises(ImageError, match=r"x\.png: this is not an image"):
        Chat(loaded).session([image("red"), str(file)])
