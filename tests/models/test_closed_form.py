"""The closed-form start: the least-squares solution, for every resampler, of the words that images tell."""

from __future__ import annotations

import pytest
import torch

from minigpt4.models.closed_form import (
    FOLDS,
    LEAST_R2,
    Moments,
    best_penalty,
    content_words,
    start_in_closed_form,
)
from tests.models import parts

ARTICLE, END, CHANCE, RED, BLUE, LARGE, SMALL = 5, 2, 40, 101, 102, 201, 202
SAMPLES = 120


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texts_and_pixels() -> tuple[list[list[int]], torch.Tensor]:
    """Return texts such as "a red large", and images that have a pattern for each of the two words, and noise."""
    noise = torch.randn(SAMPLES, 3, 28, 28, generator=generator())
    patterns = 4 * torch.randn(4, 3, 28, 28, generator=generator(1))
    draws = torch.randint(2, (SAMPLES, 3), generator=generator(2)).tolist()
    texts = []
    for n, (colour, size, chance) in enumerate(draws):
        noise[n] += patterns[colour] + patterns[2 + size]
        texts.append([ARTICLE, *[CHANCE] * chance, (RED, BLUE)[colour], (LARGE, SMALL)[size], END])
    return texts, noise


def ridge_by_least_squares(x: torch.Tensor, y: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve the ridge regression as one least-squares problem: rows for the data, rows for the penalty."""
    centred = x - x.mean(0)
    root = (penalty * centred.square().mean() * len(x)) ** 0.5
    stacked = torch.cat([centred, root * torch.eye(x.shape[1], dtype=x.dtype)])
    targets = torch.cat([y - y.mean(0), torch.zeros(x.shape[1], y.shape[1], dtype=y.dtype)])
    weight = torch.linalg.lstsq(stacked, targets, driver="gelsd").solution.T
    return weight, y.mean(0) - weight @ x.mean(0)


def test_moments_solve_the_ridge_regression_and_know_its_errors():
    x = torch.randn(50, 6, generator=generator(), dtype=torch.float64) + 3
    y = x[:, :2] @ torch.randn(2, 4, generator=generator(1), dtype=torch.float64) + x[:, 2:]
    moments = Moments(6, 4)
    for start in range(0, 50, 20):
        moments.add(x[start : start + 20], y[start : start + 20])
    weight, bias = moments.solve(0.1)
    expected = ridge_by_least_squares(x, y, 0.1)
    torch.testing.assert_close((weight, bias), expected)
    predicted = x @ weight.T + bias
    torch.testing.assert_close(moments.errors(weight, bias), (y - predicted).square().mean(0))
    torch.testing.assert_close(moments.variances(), y.var(0, correction=0))
    lengths = torch.stack([each.square().sum(1).mean().sqrt() for each in (y, predicted)])
    torch.testing.assert_close(torch.tensor(moments.lengths(weight, bias), dtype=torch.float64), lengths)


def test_the_penalty_is_the_one_that_predicts_best():
    x = torch.randn(60, 40, generator=generator(), dtype=torch.float64)
    noisy = x[:, :1] + 3 * torch.randn(60, 1, generator=generator(1), dtype=torch.float64)
    for y, expected in ((noisy, 1.0), (x[:, :1], 1e-5)):
        folds = [Moments(40, 1) for _ in range(FOLDS)]
        for n, fold in enumerate(folds):
            fold.add(x[n::FOLDS], y[n::FOLDS])
        penalty, errors = best_penalty(folds)
        assert penalty == expected
        held = []
        for n in range(FOLDS):
            others = torch.arange(60) % FOLDS != n
            weight, bias = ridge_by_least_squares(x[others], y[others], penalty)
            held.append((y[~others] - x[~others] @ weight.T - bias).square())
        torch.testing.assert_close(errors, torch.cat(held).mean(0))


def test_content_words_are_those_that_the_features_tell():
    texts, pixels = texts_and_pixels()
    features = pixels.flatten(1) @ torch.randn(3 * 28 * 28, 16, generator=generator(4)) / 50
    found = content_words(features, texts)
    assert set(found) == {RED, BLUE, LARGE, SMALL}
    assert all(LEAST_R2 < r2 <= 1 for r2 in found.values())
    assert list(found.values()) == sorted(found.values(), reverse=True)
    mixed = features[torch.randperm(SAMPLES, generator=generator(3))]
    assert content_words(mixed, texts) == {}


@pytest.mark.parametrize("kind", ["merge", "pool", "prefix", "qformer"])
def test_the_start_is_the_least_squares_solution_for_every_resampler(kind):
    model = parts.model(kind=kind)
    texts, pixels = texts_and_pixels()
    texts[3] = [ARTICLE, END]  # no content word
    model.calibrate(pixels)
    features = model.query_features(pixels)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = start_in_closed_form(model, list(features), texts)
    assert set(found.words) == {RED, BLUE, LARGE, SMALL}
    assert (found.samples, found.unused) == (SAMPLES - 1, 1)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"llama_proj.weight", "llama_proj.bias"}

    embeds = model.language_model.embed(torch.arange(parts.VOCABULARY)).detach().double()
    rows, targets = [], []
    for n, text in enumerate(texts):
        words = [token for token in text if token in found.words]
        for q in range(model.num_query_tokens):
            if words:
                rows.append(features[n, q].double())
                targets.append(embeds[words[q % 2]])
    x, y = torch.stack(rows), torch.stack(targets)
    weight, bias = ridge_by_least_squares(x, y, found.penalty)
    tokens = x @ weight.T + bias
    scale = (y.square().sum(1).mean() / tokens.square().sum(1).mean()).sqrt()
    projected = model.project(x.float()).double()
    torch.testing.assert_close(projected, scale * tokens, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(projected.square().sum(1).mean(), y.square().sum(1).mean(), rtol=1e-4, atol=0)


def test_the_start_does_not_depend_on_the_scale_of_the_features_and_has_no_randomness():
    texts, pixels = texts_and_pixels()
    tokens: list[torch.Tensor] = []
    for scale in (1.0, 1.0, 100.0):
        torch.manual_seed(len(tokens))
        model = parts.model(kind="merge")
        features = scale * model.query_features(pixels)
        start_in_closed_form(model, list(features), texts)
        tokens.append(model.project(features))
    assert torch.equal(tokens[0], tokens[1])
    torch.testing.assert_close(tokens[0], tokens[2], rtol=1e-3, atol=1e-4)


def test_image_tokens_are_nearest_to_the_words_of_images_it_has_not_seen():
    model = parts.model(kind="prefix")
    texts, pixels = texts_and_pixels()
    model.calibrate(pixels[:100])
    features = model.query_features(pixels)
    start_in_closed_form(model, list(features[:100]), texts[:100])
    embeds = model.language_model.embed(torch.arange(parts.VOCABULARY)).detach()
    nearest = torch.cosine_similarity(model.project(features[100:])[:, :2, None], embeds, dim=-1).argmax(-1)
    assert nearest.tolist() == [text[-3:-1] for text in texts[100:]]


def test_without_content_words_nothing_changes():
    model = parts.model()
    texts, pixels = texts_and_pixels()
    before = model.llama_proj.weight.clone()
    for few in ([[ARTICLE, END]] * SAMPLES, texts[: FOLDS - 1]):
        found = start_in_closed_form(model, list(model.query_features(pixels[: len(few)])), few)
        assert (found.words, found.samples, found.unused) == ({}, 0, len(few))
    assert torch.equal(model.llama_proj.weight, before)


def test_a_start_is_saved_even_where_the_projection_is_not_trained():
    model = parts.model(trainable=["lora"])
    texts, pixels = texts_and_pixels()
    assert "llama_proj.weight" not in model.trained_names()
    start_in_closed_form(model, list(model.query_features(pixels)), texts)
    assert {"llama_proj.weight", "llama_proj.bias"} <= model.trained_state().keys()
