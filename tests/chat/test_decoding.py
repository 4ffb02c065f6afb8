"""The decode loop: batch == one by one, sampling, stopping."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minigpt4.chat.answer import Answer
from minigpt4.chat.decoding.decoder import Decoder, pad_left
from minigpt4.config.sections import ChatConfig
from minigpt4.errors import DecodingError
from minigpt4.models.language_model import LanguageModel
from tests.models import parts

LENGTHS = (3, 9, 1, 6)


def prompts(llm: LanguageModel) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return [llm.embed(torch.randint(3, 700, (1, n), generator=generator))[0] for n in LENGTHS]


def answers_for(rows: list[torch.Tensor], **settings) -> list[Answer]:
    chosen = ChatConfig(**{"max_new_tokens": 8, **settings})
    return [Answer(parts.encoder(), chosen, ()) for _ in rows]


def finish(decoder: Decoder, answers: list[Answer]) -> list[list[int]]:
    """Decode until all rows are done and return the ids of each."""
    while not decoder.is_idle:
        decoder.step()
    for answer in answers:
        if answer.error:
            raise answer.error
    return [answer.ids for answer in answers]


def run(llm: LanguageModel, rows: list[torch.Tensor], **settings) -> list[list[int]]:
    """Return the ids of each row."""
    decoder, answers = Decoder(llm), answers_for(rows, **settings)
    decoder.join(answers, rows)
    return finish(decoder, answers)


def test_prompts_are_padded_on_the_left():
    embeds, padding = pad_left([torch.ones(2, 3), torch.ones(4, 3)])
    assert padding == [2, 0]
    assert embeds[..., 0].tolist() == [[0, 0, 1, 1], [1] * 4]


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("family", parts.FAMILIES)
def test_a_batch_gives_the_rows_one_by_one(family, penalty):
    torch.manual_seed(1)
    llm = parts.language_model(family)
    rows = prompts(llm)
    together = run(llm, rows, repetition_penalty=penalty)
    assert together == [run(llm, [row], repetition_penalty=penalty)[0] for row in rows]


def logits_of(llm: LanguageModel, rows: list[torch.Tensor], tokens: int = 8) -> torch.Tensor:
    """Return the logits (T, B, V) that the rows' tokens were chosen from."""
    seen: list[torch.Tensor] = []
    head = llm.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: seen.append(out[:, -1].clone()))
    run(llm, rows, max_new_tokens=tokens)
    hook.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("family", parts.FAMILIES)
def test_logits_of_a_batch_are_those_of_its_rows(family):
    torch.manual_seed(4)
    llm, tolerance = parts.language_model(family), 1e-4
    if family != "gemma2":  # its eager attention takes the softmax in float32, whatever the precision of the model
        llm, tolerance = llm.double(), 1e-9
    rows = prompts(llm)
    together = logits_of(llm, rows)
    for n, row in enumerate(rows):
        torch.testing.assert_close(together[:, n], logits_of(llm, [row])[:, 0], atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", parts.FAMILIES)
def test_the_cache_gives_the_tokens_of_the_whole_row_read_again(family):
    torch.manual_seed(2)
    llm = parts.language_model(family)
    row = prompts(llm)[1]
    (found,) = run(llm, [row])
    with torch.no_grad():
        whole = torch.cat([row, llm.embed(torch.tensor(found))])
        logits = llm(whole.unsqueeze(0), torch.ones(1, len(whole), dtype=torch.bool))
    assert logits[0, len(row) - 1 : -1].argmax(-1).tolist() == found


@pytest.mark.parametrize("family", parts.FAMILIES)
def test_rows_come_and_go_between_steps(family):
    """Each at a time of its own, with settings of its own; each as if it were alone."""
    torch.manual_seed(3)
    llm = parts.language_model(family)
    rows = prompts(llm)
    settings: list[dict[str, Any]] = [
        {"max_new_tokens": 12},
        {"max_new_tokens": 2, "repetition_penalty": 1.5},
        {"max_new_tokens": 9, "temperature": 2.0, "seed": 5},
        {"max_new_tokens": 6, "temperature": 2.0, "seed": 5, "top_k": 50},
    ]
    alone = [run(llm, [row], **own)[0] for row, own in zip(rows, settings, strict=True)]
    decoder = Decoder(llm)
    answers = [answers_for([row], **own)[0] for row, own in zip(rows, settings, strict=True)]
    for answer, row in zip(answers, rows, strict=True):
        decoder.join([answer], [row])
        decoder.step()
        decoder.step()
    assert finish(decoder, answers) == alone
    assert [answer.finish_reason for answer in answers] == ["length"] * 4


def test_a_cancelled_row_leaves_and_the_others_go_on():
    llm = parts.language_model()
    rows = prompts(llm)
    whole = run(llm, rows)
    decoder, answers = Decoder(llm), answers_for(rows)
    decoder.join(answers, rows)
    decoder.step()
    answers[1].cancel()
    assert finish(decoder, answers) == [whole[0], whole[1][:2], *whole[2:]]
    assert answers[1].finish_reason == "cancelled"


def test_sampling_repeats_with_its_seed_and_obeys_its_limits():
    llm = parts.language_model()
    rows = prompts(llm)
    first = run(llm, rows, temperature=2.0, seed=7)
    assert first == run(llm, rows, temperature=2.0, seed=7)
    assert first != run(llm, rows, temperature=2.0, seed=8)
    greedy = run(llm, rows)
    assert run(llm, rows, temperature=2.0, top_k=1) == greedy
    assert run(llm, rows, temperature=2.0, top_p=1e-6) == greedy


def test_whole_numbers_are_settings_too():
    """A slider at 1 and a notebook give `1`, and transformers' processors require floats."""
    llm = parts.language_model()
    whole = run(llm, prompts(llm), temperature=1, top_p=1, repetition_penalty=2)
    assert whole == run(llm, prompts(llm), temperature=1.0, top_p=1.0, repetition_penalty=2.0)


def test_a_strong_penalty_repeats_nothing():
    for ids in run(parts.language_model(), prompts(parts.language_model()), repetition_penalty=1e6):
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(bad):
    llm = parts.language_model()
    with torch.no_grad():
        llm.model.lm_head.weight[5, 0] = bad
    with pytest.raises(DecodingError, match="logits are not finite; load it in bfloat16 or float32"):
        run(llm, prompts(llm))


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"repetition_penalty": 0.0}],
)
def test_settings_that_no_decoding_can_use(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ChatConfig(**settings)
