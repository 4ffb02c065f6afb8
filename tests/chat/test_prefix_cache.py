"""Sessions that keep their cache: equal to reading everything again, and only new tokens are read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from torch import Tensor

from minigpt4.chat.session import Chat, Session
from minigpt4.checkpoints.assemble import LoadedModel, load_model
from minigpt4.config.sections import ChatConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.errors import ContextLengthError, ConversationError
from tests.chat.conftest import ids_of, image, load, teach

pytestmark = pytest.mark.slow

COLOURS = ["red", "green", "blue", "white"]


@contextmanager
def watch(loaded: LoadedModel) -> Iterator[tuple[list[Tensor], list[int]]]:
    """Note the last logits of every pass, and how many positions it was fed."""
    logits: list[Tensor] = []
    fed: list[int] = []
    model = loaded.model.language_model.model
    hooks = [
        model.get_output_embeddings().register_forward_hook(lambda m, a, out: logits.append(out[0, -1].clone())),
        model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: fed.append(args[0].shape[1])),
    ]
    yield logits, fed
    for hook in hooks:
        hook.remove()


@torch.inference_mode()
def check_last_turn(session: Session, logits: list[Tensor], fed: list[int], tolerance: float = 1e-9) -> None:
    """Compare what a turn was answered from with reading its whole prompt and answer without a cache."""
    found, read = torch.stack(logits), list(fed)
    ids = found.argmax(-1).tolist()
    loaded, turns = session.engine.loaded, session.turns
    dialogue = Dialogue((*turns[:-1], Turn(turns[-1].question)), session.dialogue.system)
    prompt = loaded.conversation.encode_prompt(dialogue, num_images=len(session.pictures))
    llm = loaded.model.language_model
    embeds = session.engine.embed_encoded(prompt, session.features)
    whole = torch.cat([embeds, llm.embed(torch.tensor(ids[:-1], dtype=torch.long))])
    wanted = llm.model(inputs_embeds=whole.unsqueeze(0), use_cache=False).logits[0, len(embeds) - 1 :]
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)
    for token, row in zip(ids, wanted, strict=True):
        best, second = row.topk(2).values
        assert int(row.argmax()) == token or best - second <= tolerance
    assert read == [session.last.prefilled_tokens] + [1] * (len(ids) - 1)
    logits.clear()
    fed.clear()


def converse(session: Session) -> Iterator[Session]:
    """Ten turns and more, with images at the start and later, edits, another try, a branch, a turn stopped early."""
    steps = [
        lambda s: s.ask("What is this?"),
        lambda s: s.ask("Why?"),
        lambda s: s.ask("And these?", images=[image("blue"), image("white")]),
        lambda s: s.ask("Is it large?"),
        lambda s: s.edit("Is it small?"),
        lambda s: s.ask("Tell me more."),
        lambda s: s.regenerate(),
        lambda s: s.ask("Who made <ImageHere>, and when?", images=[image("green")]),
        lambda s: s.ask("Really?"),
        lambda s: (s.keep(4), s.ask("What else?")),
        lambda s: s.ask("And then?"),
        lambda s: s.edit(""),
        lambda s: s.ask("Good bye."),
    ]
    for number, step in enumerate(steps):
        if number == 6:
            session = session.branch()
        step(session)
        yield session


def check(loaded: LoadedModel, tolerance: float) -> None:
    session = Chat(loaded, ChatConfig(max_new_tokens=6)).session([image("red")])
    with watch(loaded) as (logits, fed):
        for current in converse(session):
            assert current.last.forgotten_turns == 0
            check_last_turn(current, logits, fed, tolerance)


@pytest.mark.parametrize("template", ["vicuna_v0", "chatml", "llama2"])
def test_ten_turns_with_edits_and_images_equal_reading_everything_again(load_with, template):
    loaded = load_with(template=template)
    loaded.model.language_model.double()
    check(loaded, 1e-9)


@pytest.mark.long
@pytest.mark.mini
def test_ten_turns_of_the_mini_model_equal_reading_everything_again():
    options = ["model.language_model.dtype=float32", "conversation.isolate_turns=false"]
    check(load_model("mini", options, device="cpu"), 1e-3)


def test_isolated_turns_are_asked_without_earlier_turns(load_with, tmp_path):
    loaded = load_with(template="vicuna_v0", isolate_turns=True)
    loaded.model.language_model.double()
    chat = Chat(loaded, ChatConfig(max_new_tokens=6))
    red, blue = image("red"), image("blue")

    def alone(images: list[Image.Image], question: str) -> tuple[str, int]:
        fresh = chat.session(images)
        return fresh.ask(question), fresh.last.prompt_tokens

    session = chat.session([red])
    session.ask("What is this?")
    assert (session.ask("Why?"), session.last.prompt_tokens) == alone([red], "Why?")
    assert session.last.prefilled_tokens < session.last.prompt_tokens - loaded.model.num_query_tokens
    other = session.branch()
    alike = session.ask("Are they alike?", images=[blue])
    assert (alike, session.last.prompt_tokens) == alone([red, blue], "Are they alike?")
    assert session.regenerate() == alike
    session.save(tmp_path / "talk")
    assert session.ask("Which?") == chat.open(tmp_path / "talk").ask("Which?") == alone([red, blue], "Which?")[0]
    assert other.ask("Which?") == alone([red], "Which?")[0]
    bare = chat.session()
    bare.ask("Hello.")
    placed = "Is <ImageHere> like <ImageHere>?"
    assert (bare.ask(placed, images=[red, blue]), bare.last.prompt_tokens) == alone([red, blue], placed)


def test_only_what_is_new_is_read(loaded):
    session = Chat(loaded, ChatConfig(max_new_tokens=6)).session([image("red")])
    session.ask("What is this?")
    assert session.last.prefilled_tokens == session.last.prompt_tokens
    for number in range(8):
        before = session.last
        assert before.finish_reason == "length"
        session.ask("And why? " * number)
        # The last token of an answer is chosen, and not read yet.
        known = before.prompt_tokens + before.answer_tokens - 1
        assert session.last.prefilled_tokens == session.last.prompt_tokens - known
    last = session.last
    session.regenerate()
    assert (session.last.prefilled_tokens, session.last.prompt_tokens) == (1, last.prompt_tokens)
    branch = session.branch()
    branch.ask("Go on.")
    assert branch.last.prefilled_tokens < 30 < branch.last.prompt_tokens
    assert len(session.turns) == len(branch.turns) - 1
    assert session.ask("Go on.") == branch.turns[-1].answer


def test_an_edit_reads_from_the_first_difference_on(loaded):
    session = Chat(loaded, ChatConfig(max_new_tokens=6)).session([image("red")])
    session.ask("What is this?")
    session.ask("Is it a bird of the sea?")
    session.edit("Is it a bird of the wood?")
    assert session.turns[-1].question == "Is it a bird of the wood?"
    assert len(session.turns) == 2
    assert session.last.prefilled_tokens < 20


def test_another_image_is_never_taken_for_a_known_one(loaded):
    session = Chat(loaded, ChatConfig(max_new_tokens=6)).session()
    session.ask("What?", images=[image("red")])
    session.keep(0)
    assert session.pictures == []
    with watch(loaded) as (logits, fed):
        session.ask("What?", images=[image("blue")])
        prompt = loaded.conversation.encode_prompt(Dialogue((Turn("What?"),)), num_images=1)
        assert fed[0] == len(prompt.input_ids) - int(prompt.image_mask.nonzero()[0])  # from the image on
        check_last_turn(session, logits, fed, 1e-4)


def test_undo_keeps_the_images_of_the_turn_for_the_next_question(loaded):
    session = Chat(loaded).session([image("red")])
    session.ask("What?")
    session.ask("And this?", images=[image("blue")])
    assert session.undo() == "<ImageHere> And this?"
    session.ask("How about it?")
    assert session.turns[-1].question == "<ImageHere> How about it?"
    session.reset()
    assert len(session.pictures) == 1
    assert session.turns == ()
    with pytest.raises(ConversationError, match="no turn to undo"):
        session.undo()


def test_a_stream_that_is_closed_keeps_what_it_has_shown(loaded):
    loaded.model.language_model.double()
    session = Chat(loaded, ChatConfig(max_new_tokens=40)).session([image("red")])
    session.ask("What is this?")
    stream = session.stream("Tell me everything.")
    shown = [next(stream) for _ in range(3)]
    stream.close()
    assert session.turns[-1].answer == "".join(shown)
    assert session.last.finish_reason == "cancelled"
    with watch(loaded) as (logits, fed):
        session.ask("Go on.", max_new_tokens=5)
        assert session.last.prefilled_tokens < 40 < session.last.prompt_tokens
        check_last_turn(session, logits, fed)


def test_a_stream_closed_before_it_began_leaves_no_turn(loaded):
    session = Chat(loaded).session()
    session.stream("Never begun").close()
    assert session.turns == ()


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(loaded):
    session = Chat(loaded, ChatConfig(max_new_tokens=6)).session([image("red")])
    session.ask("What is this?")
    wanted = session.branch().ask("Why?")
    head = loaded.model.language_model.model.lm_head
    weight = head.weight
    head.weight = torch.nn.Parameter(weight[:, :5])
    with pytest.raises(RuntimeError):
        session.ask("Why?", images=[image("blue")])
    head.weight = weight
    assert (len(session.turns), len(session.pictures)) == (1, 1)
    assert session.ask("Why?") == wanted
    assert session.last.prefilled_tokens == session.last.prompt_tokens  # a pass that broke off is not trusted


def test_ids_not_text_are_what_the_model_reads_again(loaded):
    """The answer is spelt byte by byte; tokenised again, its text would be other tokens."""
    chain = ids_of(loaded, *[f"<0x{byte:02X}>" for byte in b"the"], "##", "#")
    teach(loaded, chain)
    session = Chat(loaded, ChatConfig(max_new_tokens=20)).session()
    assert session.ask("What?") == "the"
    assert session.turns[0].answer_ids == tuple(chain[:3])
    assert loaded.conversation.tokenizer.tokenize([("the", False)]) != chain[:3]
    prompt = loaded.conversation.encode_prompt(
        Dialogue((*session.turns, Turn("And?"))), num_images=0
    ).input_ids.tolist()
    start = prompt.index(chain[0])
    whole = [*chain[:3], *loaded.conversation.end_ids]
    assert prompt[start : start + len(whole)] == whole


def test_a_long_conversation_forgets_turns_and_never_the_image(loaded, caplog):
    llm = loaded.model.language_model
    llm.model.config.max_position_embeddings = 120
    sessions = [Chat(loaded, ChatConfig(max_new_tokens=6)).session([image(colour)]) for colour in ("red", "blue")]
    seen: list[list[Tensor]] = []
    for session in sessions:
        with caplog.at_level(logging.WARNING, "minigpt4"), watch(loaded) as (logits, fed):
            for number in range(40):
                session.ask(f"Question {number}?")
                assert session.last.prompt_tokens + 6 <= 120
                assert fed[0] == session.last.prefilled_tokens
                fed.clear()
                if number < 39:
                    logits.clear()
            seen.append(list(logits))
        assert len(session.turns) == 40  # the transcript is whole
        assert session.last.forgotten_turns > 30
    assert "does not see the oldest 1 of" in caplog.text
    assert not torch.allclose(seen[0][0], seen[1][0])  # turn 40 depends on the image
    prompt, _ = sessions[0]._fit(Turn("Question 40?"), 1, 6)
    ids = prompt.input_ids.tolist()
    opening = loaded.conversation.encode_prompt(Dialogue(session.turns[:1]), num_images=1)
    until = int(opening.image_mask.nonzero().max()) + 1
    assert ids[:until] == opening.input_ids[:until].tolist()  # BOS, opening, image
    assert int(prompt.image_mask.sum()) == 4


def test_a_turn_of_a_long_conversation_is_encoded_as_often_as_one_of_a_short(loaded, monkeypatch):
    loaded.model.language_model.model.config.max_position_embeddings = 120
    encode, calls = loaded.conversation.encode_prompt, []

    def counted(dialogue, **values):
        calls.append(len(dialogue.turns))
        return encode(dialogue, **values)

    monkeypatch.setattr(loaded.conversation, "encode_prompt", counted)
    turns = tuple(Turn(f"Question {n}?", "blue " * (n % 7)) for n in range(400))
    session = Chat(loaded, ChatConfig(max_new_tokens=6)).session()
    session.dialogue = Dialogue(turns)  # as a saved conversation: nothing is known about it
    prompt, forgotten = session._fit(Turn("And now?"), 0, 6)
    assert len(calls) < 15
    assert len(prompt.input_ids) <= 114
    longer = Dialogue((*turns[forgotten - 1 :], Turn("And now?")))
    assert len(encode(longer, num_images=0).input_ids) > 114  # not one turn too many is left out
    session.ask("And now?")
    for _ in range(5):
        calls.clear()
        session.ask("And now?")
        assert len(calls) <= 4
        assert max(calls) < 40
    session.keep(3)  # the last count is now too high
    assert session._fit(Turn("And now?"), 0, 6)[1] == 0


def test_system_text_stays_and_one_turn_that_is_too_long_is_an_error(loaded):
    loaded.model.language_model.model.config.max_position_embeddings = 120
    session = Chat(loaded, ChatConfig(max_new_tokens=6)).session([image("red")], system="Be brief and kind.")
    for number in range(9):
        session.ask(f"Question {number}?")
    assert session.last.forgotten_turns
    text = loaded.conversation.tokenizer.decode([e for e in session._prefix.entries if isinstance(e, int)])
    assert "Be brief and kind." in text
    turns = session.turns
    with pytest.raises(ContextLengthError, match=r"without any earlier turn .* reads 120: ask a shorter question"):
        session.ask("long " * 200)
    assert session.turns == turns
    session.ask("Short?")


def test_beams_in_a_session(loaded):
    loaded.model.language_model.double()
    session = Chat(loaded, ChatConfig(max_new_tokens=6)).session([image("red")])
    session.ask("What is this?")
    best = session.branch().ask("Why?", num_beams=3)
    assert session.ask("Why?", num_beams=3) == best
    assert session.last.prefilled_tokens == session.last.prompt_tokens  # a search reads everything again
    with watch(loaded) as (logits, fed):
        session.ask("Go on.")
        check_last_turn(session, logits, fed)


def test_the_published_chat_reads_text_again(tiny_values, write_config):
    loaded = load(tiny_values | {"compat": "published"}, write_config)
    loaded.model.language_model.double()
    session = Chat(loaded, ChatConfig(max_new_tokens=6)).session([image("red")])
    with watch(loaded) as (logits, fed):
        for question in ("What is this?", "Why?", "Where?"):
            session.ask(question)
            check_last_turn(session, logits, fed)
