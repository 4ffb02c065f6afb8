"""Shapes, prompts and masks, image positions, gradients, one step, save and load, generation: for every pair."""

from __future__ import annotations

import dataclasses
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from minigpt4 import Chat, load_model
from minigpt4.batch import IGNORE, Sample
from minigpt4.chat.answer import Answer
from minigpt4.chat.engine import Engine, Prompt
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.config import Config, config_from_values
from minigpt4.config.sections import ChatConfig
from minigpt4.conversation.dialogue import Dialogue, Turn
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.datasets.collate import collate, pack
from minigpt4.errors import ConfigError, ContextLengthError
from minigpt4.models.freezing import part_of
from minigpt4.runners.train import TrainRunner

GREEDY = ChatConfig(max_new_tokens=12)
SHORT = {"max_new_tokens": 4}
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
QUESTION, ANSWER = "What is on the plate?", "A small red bird, I think."
Loaded = LoadedModel


def dialogue(*turns: tuple[str, str | None]) -> Dialogue:
    return Dialogue(tuple(Turn(*turn) for turn in turns))


def noise(loaded: Loaded, images: int, seed: int = 0) -> Tensor:
    spec = loaded.image_processor.spec
    return torch.randn(images, 3, spec.height, spec.width, generator=torch.Generator().manual_seed(seed))


def question_of(loaded: Loaded, words: str) -> str:
    """A question, or none if the format has captions only."""
    return "" if loaded.conversation.training_template.name == "plain" else words


def sample(loaded: Loaded, name: str, *turns: tuple[str, str], images: int) -> Sample:
    asked = [(question_of(loaded, question), answer) for question, answer in turns]
    encoded = loaded.conversation.encode_dialogue(dialogue(*asked), num_images=images, sample_id=name)
    pixels = noise(loaded, images, seed=len(name)) if images else None
    return Sample(id=name, pixel_values=pixels, **vars(encoded))


def samples(loaded: Loaded) -> list[Sample]:
    """Rows of different lengths, with one, two and no images."""
    return [
        sample(loaded, "one", (QUESTION, ANSWER), images=1),
        sample(loaded, "two!", ("Compare them.", "Same."), ("Why do you say so?", "Both are blue."), images=2),
        sample(loaded, "none?", ("Say hello to everybody.", "Hello!"), images=0),
    ]


def keeps_parts_apart(loaded: Loaded) -> None:
    """Skip the test if the language model reports that it cannot keep the parts of a row apart."""
    try:
        loaded.model.language_model.attention_kinds()
    except ConfigError as error:
        pytest.skip(str(error))


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (3, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy()).resize((60, 50), Image.Resampling.NEAREST)


# ------------------------------------------------------------------------------------------------------------ shapes


@torch.no_grad()
def test_shapes_are_those_of_the_attributes(loaded):
    model = loaded.model
    pixels = torch.stack([loaded.image_processor(picture(n)) for n in range(2)])
    patches = model.vision_encoder(pixels)
    features = model.query_features(pixels)
    embeds = model.project(features)
    assert patches.shape == (2, model.vision_encoder.num_patches, model.vision_encoder.feature_dim)
    assert features.shape == (2, model.num_query_tokens, model.resampler.feature_dim)
    assert embeds.shape == (2, model.num_query_tokens, model.language_model.hidden_size)
    assert not torch.equal(features[0], features[1])  # different images look different
    batch = collate(samples(loaded), 0)
    logits = model.logits(batch)
    assert logits.shape == (batch.num_supervised, model.language_model.vocab_size)
    for tensor in (patches, features, embeds, logits):
        assert torch.isfinite(tensor).all()


# ------------------------------------------------------------------------------------------------- prompts and masks


def test_labels_are_every_answer_with_its_end_mark_and_nothing_else(loaded):
    encoder = loaded.conversation
    turns: tuple[tuple[str, str], ...] = ((QUESTION, ANSWER), ("And what else?", "Nothing."))
    if encoder.training_template.question == ("", ""):
        turns = turns[:1]  # captions (`plain`) have no questions that would stand between two answers
    row = sample(loaded, "row", *turns, images=1)
    supervised = row.labels != IGNORE
    assert torch.equal(row.labels[supervised], row.input_ids[supervised])
    assert not (supervised & row.image_mask).any()
    runs = [list(run) for is_label, run in groupby(row.labels.tolist(), key=lambda i: i != IGNORE) if is_label]
    end = encoder.training_template.end
    expected = [f"{answer}{end}" for _, answer in turns]
    assert [encoder.tokenizer.decode(run, keep_special=True) for run in runs] == expected
    assert int(row.image_mask.sum()) == encoder.tokens_per_image == loaded.model.num_query_tokens
    assert 0 <= int(row.input_ids.min()) <= int(row.input_ids.max()) < loaded.model.language_model.vocab_size
    bos = encoder.tokenizer.bos_id
    assert bos is None or row.input_ids[:2].tolist() != [bos, bos]


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_prompt_of_chat_is_the_beginning_of_the_row_of_training(loaded, images):
    question = question_of(loaded, QUESTION)
    if not images and not question:
        pytest.skip("a caption without an image has no prompt")
    row = loaded.conversation.encode_dialogue(dialogue((question, ANSWER)), num_images=images, sample_id="row")
    prompt = loaded.conversation.encode_prompt(dialogue((question, None)), num_images=images)
    length = len(prompt.input_ids)
    assert torch.equal(row.input_ids[:length], prompt.input_ids)
    assert torch.equal(row.image_mask[:length], prompt.image_mask)
    assert (row.labels[:length] == IGNORE).all()
    assert row.labels[length] != IGNORE


def test_marks_typed_by_users_do_not_end_a_turn(loaded):
    encoder = loaded.conversation
    if encoder.training_template.name == "plain":
        pytest.skip("captions have no question")
    special = {encoder.tokenizer.tokenizer.convert_tokens_to_ids(token) for token in encoder.tokenizer.special_tokens}

    def count(question: str) -> int:
        ids = encoder.encode_prompt(dialogue((question, None)), num_images=0).input_ids.tolist()
        return sum(token in special for token in ids)

    assert count("".join(encoder.tokenizer.special_tokens)) == count("Hello")


# --------------------------------------------------------------------------------------------------- image positions


@torch.no_grad()
def test_images_are_at_their_positions_in_their_order_and_nowhere_else(loaded):
    model = loaded.model
    row = sample(loaded, "row", (QUESTION, ANSWER), images=2)
    there = collate([row], 0)
    back = collate([dataclasses.replace(row, pixel_values=row.pixel_values.flip(0))], 0)
    embeds, swapped = model.embed(there), model.embed(back)
    places = there.image_mask[0]
    images = model.encode_images(row.pixel_values)
    dtype = embeds.dtype
    torch.testing.assert_close(embeds[0, places], images.flatten(0, 1).to(dtype), **CLOSE)
    torch.testing.assert_close(swapped[0, places], images.flip(0).flatten(0, 1).to(dtype), **CLOSE)
    assert not torch.equal(embeds[0, places], swapped[0, places])
    plain = model.language_model.embed(there.input_ids)
    assert torch.equal(embeds[0, ~places], plain[0, ~places])


@torch.no_grad()
def test_padding_and_packing_change_no_loss(loaded):
    model, rows = loaded.model, samples(loaded)
    alone = torch.stack([model(collate([row], 0)) for row in rows])
    sums, _ = model.losses_per_sample(collate(rows, 0))
    torch.testing.assert_close(sums, alone, **CLOSE)
    keeps_parts_apart(loaded)
    packed = pack(rows, 0, sum(len(row.input_ids) for row in rows) + 3)
    assert len(packed) == 1
    torch.testing.assert_close(model(packed), alone.sum(), **CLOSE)


@torch.no_grad()
def test_the_loss_of_isolated_turns_is_the_sum_of_each_turn_alone(loaded):
    if not question_of(loaded, QUESTION):
        pytest.skip("captions have one turn")
    keeps_parts_apart(loaded)
    ours, model = loaded.conversation, loaded.model
    settings = dataclasses.replace(ours.settings, isolate_turns=True)
    isolating = ConversationEncoder(ours.tokenizer, ours.tokens_per_image, settings)
    turns = ((QUESTION, ANSWER), ("Is it blue?", "No."), ("And how many are there?", "One."))
    pixels = noise(loaded, 1)

    def loss(encoder: ConversationEncoder, *turns: tuple[str, str]) -> Tensor:
        encoded = encoder.encode_dialogue(dialogue(*turns), num_images=1, sample_id="row")
        return model(collate([Sample(id="row", pixel_values=pixels, **vars(encoded))], 0))

    alone = sum(loss(isolating, turn) for turn in turns)
    torch.testing.assert_close(loss(isolating, *turns), alone, **CLOSE)


@torch.no_grad()
def test_ids_and_their_embeds_give_the_same_logits(loaded):
    """Scaling, position embeddings and capping of the family are neither lost nor applied twice."""
    llm = loaded.model.language_model
    ids = collate([sample(loaded, "none", (QUESTION, ANSWER), images=0)], 0).input_ids
    expected = llm.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(llm(llm.embed(ids), torch.ones_like(ids, dtype=torch.bool)), expected, **CLOSE)
    torch.testing.assert_close(llm(llm.embed(ids), None), expected, **CLOSE)


# ---------------------------------------------------------------------------------------------- gradients and a step


def test_only_what_is_trainable_has_a_gradient(loaded):
    model, batch = loaded.model, collate(samples(loaded), 0)
    model.train()
    try:
        model(batch).backward()
        found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert found == {name for name, _ in model.named_parameters() if part_of(name) in model.trainable}
        projection = dict(model.llama_proj.named_parameters())
        assert {f"llama_proj.{name}" for name in projection} <= found
        for parameter in projection.values():
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().max() > 0
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()


def test_a_step_changes_what_is_trainable_and_the_checkpoint_restores_it(pair, loaded, tmp_path):
    trained = TrainRunner.from_config(training_config(pair, tmp_path)).run().model
    before, after = loaded.model.state_dict(), trained.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor.cpu(), before[name])}
    assert {name for name in before if part_of(name) == "llama_proj"} <= changed
    assert changed <= trained.trained_names()
    calibrated = {f"resampler.{name}" for name in trained.resampler.calibrated}
    assert {part_of(name) for name in changed - calibrated} <= set(trained.trainable)
    again = load_model(tmp_path / "run" / "checkpoints" / "latest", device="cpu")
    assert again.manifest is not None
    assert set(again.manifest.trained) >= changed
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, after[name].cpu()), name
    batch = collate(samples(again), 0)
    with torch.no_grad():  # sums over memory that is aligned differently
        torch.testing.assert_close(again.model(batch), trained.cpu().eval()(batch), rtol=1e-6, atol=0)


def training_config(pair: Config, folder: Path) -> Config:
    """One step on two images with captions, everything else as the pair has it."""
    (folder / "pairs" / "image").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for n in range(2):
        picture(n).save(folder / "pairs" / "image" / f"{n}.jpg")
        rows.append({"image_id": str(n), "caption": ANSWER})
    (folder / "pairs" / "filter_cap.json").write_text(json.dumps({"annotations": rows}))
    changes = {
        "datasets": {"train": {"pairs": {"type": "aligned_pairs", "path": str(folder / "pairs")}}},
        "run": {
            "output_dir": str(folder / "run"),
            "seed": pair.run.seed,  # what is random in the pair must be the same
            "device": "cpu",
            "total_steps": 1,
            "global_batch_size": 2,
            "batch_size_per_rank": 2,
            **dict.fromkeys(("learning_rate", "min_learning_rate", "warmup_start_learning_rate"), 1e-2),
        },
    }
    return config_from_values({**pair.values, **changes}, "pair")


# -------------------------------------------------------------------------------------------------------- generation


def prompts(engine: Engine) -> list[Prompt]:
    """Prompts of different lengths, with one, two and (if the template has questions) no images."""
    asked = [(QUESTION, 1), ("Is the left one like the right one, or is it not?", 2), ("Hello?", 0)]
    return [
        Prompt(
            dialogue((question_of(engine.loaded, question), None)),
            engine.query_features([picture(n) for n in range(images)]),
        )
        for question, images in asked
        if images or question_of(engine.loaded, question)
    ]


def test_a_batch_answers_as_one_by_one_and_as_a_stream(loaded):
    engine = Engine(loaded)
    asked = prompts(engine)
    together = engine.answer(asked, GREEDY)
    assert together == [engine.answer([prompt], GREEDY)[0] for prompt in asked]
    embeds = [engine.embeds(prompt, GREEDY.max_new_tokens) for prompt in asked]
    assert together == ["".join(engine.stream(engine.new_answer(GREEDY), row)) for row in embeds]


@torch.no_grad()
def test_answers_are_those_of_the_model_without_a_cache(loaded):
    engine, llm, end = Engine(loaded), loaded.model.language_model, loaded.conversation.training_template.end
    for prompt in prompts(engine):
        row, ids = engine.embeds(prompt, GREEDY.max_new_tokens).unsqueeze(0), []
        for _ in range(GREEDY.max_new_tokens):
            token = int(llm(row, None)[0, -1].argmax())
            ids.append(token)
            if token in engine.end_ids or (end and end in text_of(loaded, ids)):
                break
            row = torch.cat([row, llm.embed(torch.tensor([[token]]))], dim=1)
        assert engine.answer([prompt], GREEDY) == [answer_of(loaded, ids)]


def test_without_an_image_the_answer_is_that_of_the_language_model_alone(loaded):
    if not question_of(loaded, QUESTION):
        pytest.skip("a caption without an image has no prompt")
    asked = dialogue((QUESTION, None))
    ids = loaded.conversation.encode_prompt(asked, num_images=0).input_ids.unsqueeze(0)
    out = loaded.model.language_model.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=GREEDY.max_new_tokens,
        do_sample=False,
        eos_token_id=Engine(loaded).end_ids or None,
        pad_token_id=0,
    )
    assert Engine(loaded).answer([Prompt(asked)], GREEDY) == [answer_of(loaded, out[0, ids.shape[1] :].tolist())]


def test_a_conversation_continues(loaded):
    chat = Chat(loaded, GREEDY)
    session = chat.session(images=[picture(0)])
    question = question_of(loaded, QUESTION)
    session.ask(question)
    second = session.ask("And then?")
    whole = Dialogue((session.turns[0], Turn("And then?")))
    assert second == chat.engine.answer([Prompt(whole, chat.engine.query_features([picture(0)]))], GREEDY)[0]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_an_error(loaded):
    context = loaded.model.language_model.context_length
    assert context >= 64
    with pytest.raises(ContextLengthError, match=f"reads {context}"):
        Chat(loaded, GREEDY).session(images=[picture(0)]).ask(question_of(loaded, QUESTION), max_new_tokens=context)


def text_of(loaded: Loaded, ids: list[int]) -> str:
    return loaded.conversation.tokenizer.decode(ids, keep_special=True)


def answer_of(loaded: Loaded, ids: list[int]) -> str:
    """The text of raw ids up to where the answer ends, read token by token as a stream is.

    Decoded at once, half a character would change the letters before it: tokenizers with byte tokens join them.
    """
    answer = Answer(loaded.conversation, GREEDY, Engine(loaded).end_ids)
    for token in ids:
        if answer.finish_reason is None:
            answer.add(token)
    return answer.text
