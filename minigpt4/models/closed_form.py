"""A closed-form start of `llama_proj`: image tokens that read like the words of the images' captions.

Input: query features of training images, and the token ids of their texts. Output: the weights of `llama_proj`, and
what they were made of. Two ridge regressions, no gradients:

1. Which words do the images tell? From the mean feature of an image to the presence of every token of the texts. A
   token is a content word if its presence is predicted on samples that the fit has not seen; articles, end marks and
   chance wordings are not.
2. From the features at a query position to the embed of a content word: query position q of an image becomes word
   number q of its text, counted again from the first after the last.

The result is scaled to the length of the language model's embeds, which a new projection is far from.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt4.models.minigpt4 import MiniGPT4

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties that are tried, as shares of the mean variance of a feature; the best in cross-validation is used."""
FOLDS = 5
"""Parts of the samples; each is held out once, to choose the penalty and the words."""
LEAST_SAMPLES = 8
"""A token in fewer texts than this, or missing from fewer, is no candidate: too little to judge it by."""
LEAST_R2 = 0.05
"""Share of a token's variance that the features must explain in cross-validation."""


class Moments:
    """First and second moments of pairs (x, y), in float64 on the CPU: all that a ridge regression needs.

    Args:
        inputs: width of x.
        outputs: width of y.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.count = 0
        self._x, self._y = torch.zeros(inputs, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64)
        self._xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._xy = torch.zeros(inputs, outputs, dtype=torch.float64)
        self._yy = torch.zeros(outputs, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows of x (R, inputs) and y (R, outputs)."""
        x, y = x.cpu().double(), y.cpu().double()
        self.count += len(x)
        self._x += x.sum(0)
        self._y += y.sum(0)
        self._xx.addmm_(x.T, x)
        self._xy.addmm_(x.T, y)
        self._yy += y.square().sum(0)

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the rows of both."""
        joined = Moments(len(self._x), len(self._y))
        joined.count = self.count + other.count
        for name in ("_x", "_y", "_xx", "_xy", "_yy"):
            setattr(joined, name, getattr(self, name) + getattr(other, name))
        return joined

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Return the weight (outputs, inputs) and bias (outputs,) of the ridge regression, float64.

        The features are whitened with the Cholesky root of their covariance, to which `penalty` times the mean variance
        is added; in these coordinates the solution is the covariance with y, and the root is folded in afterwards. The
        prediction of a scaled feature is the same. The bias is not penalised.
        """
        mean_x, mean_y = self._x / self.count, self._y / self.count
        covariance = self._xx / self.count - torch.outer(mean_x, mean_x)
        variance = covariance.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        covariance.diagonal().add_(penalty * variance)
        crossed = self._xy / self.count - torch.outer(mean_x, mean_y)
        weight = torch.cholesky_solve(crossed, torch.linalg.cholesky(covariance)).T
        return weight, mean_y - weight @ mean_x

    def errors(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the mean squared error (outputs,) of predictions `weight @ x + bias`."""
        predicted_y = ((weight @ self._xy).diagonal() + bias * self._y) / self.count
        return self._yy / self.count - 2 * predicted_y + self._predicted_squares(weight, bias)

    def variances(self) -> Tensor:
        """Return the variance (outputs,) of y."""
        return self._yy / self.count - (self._y / self.count).square()

    def lengths(self, weight: Tensor, bias: Tensor) -> tuple[float, float]:
        """Return the root mean square length of y, and of the predictions."""
        return float(self._yy.sum() / self.count) ** 0.5, float(self._predicted_squares(weight, bias).sum()) ** 0.5

    def _predicted_squares(self, weight: Tensor, bias: Tensor) -> Tensor:
        linear = ((weight @ self._xx) * weight).sum(1) + 2 * bias * (weight @ self._x)
        return linear / self.count + bias.square()


@dataclass(frozen=True)
class ClosedFormStart:
    """What a closed-form start was made of.

    Attributes:
        words: cross-validated R² of each token that counts as a content word, by id, best first; empty if there is
            none, and the model is unchanged.
        samples: samples that it was computed from.
        unused: samples without any of these words.
        penalty: of the second regression; see `PENALTIES`.
        r2: share of the variance of the embeds that the second regression explains in cross-validation.
    """

    words: dict[int, float]
    samples: int
    unused: int
    penalty: float = 0.0
    r2: float = 0.0


@torch.no_grad()
def start_in_closed_form(
    model: MiniGPT4, features: Sequence[Tensor], texts: Sequence[Sequence[int]]
) -> ClosedFormStart:
    """Set `llama_proj` from training samples; without a content word the model is left unchanged.

    The result depends on the samples and their order only: there is no randomness.

    Args:
        model: its language model gives the embeds.
        features: the query features (Q, Dq) of each sample's image.
        texts: the token ids of each sample's text.

    Returns:
        What it was made of.
    """
    words = content_words(torch.stack([each.float().mean(0) for each in features]), texts) if features else {}
    orders = [[token for token in dict.fromkeys(text) if token in words] for text in texts]
    unused = sum(not order for order in orders)
    if not words:
        return ClosedFormStart(words, 0, unused)
    llm, projection = model.language_model, model.llama_proj
    ids = torch.tensor(list(words), device=model.device)
    embeds = dict(zip(words, llm.embed(ids).cpu().double(), strict=True))
    folds = [Moments(projection.in_features, projection.out_features) for _ in range(FOLDS)]
    for number, (each, order) in enumerate(zip(features, orders, strict=True)):
        if order:
            targets = torch.stack([embeds[order[q % len(order)]] for q in range(len(each))])
            folds[number % FOLDS].add(each, targets)
    penalty, errors = best_penalty(folds)
    every = sum_of(folds)
    weight, bias = every.solve(penalty)
    wanted, found = every.lengths(weight, bias)
    projection.weight.copy_(weight * (wanted / found))
    projection.bias.copy_(bias * (wanted / found))
    model.inherited |= {"llama_proj.weight", "llama_proj.bias"}  # saved even where it is not trained
    r2 = 1 - float(errors.sum() / every.variances().sum())
    return ClosedFormStart(words, len(texts) - unused, unused, penalty, r2)


def content_words(features: Tensor, texts: Sequence[Sequence[int]]) -> dict[int, float]:
    """Return the tokens whose presence in a text the features of its image tell, with their R², best first.

    Args:
        features: (N, Dq), one row for each sample.
        texts: the token ids of each sample's text.
    """
    counts = Counter(token for text in texts for token in set(text))
    most = len(texts) - LEAST_SAMPLES
    candidates = sorted(token for token, n in counts.items() if LEAST_SAMPLES <= n <= most)
    if not candidates:
        return {}
    column = {token: n for n, token in enumerate(candidates)}
    present = torch.zeros(len(texts), len(candidates), dtype=torch.float64)
    for row, text in enumerate(texts):
        present[row, [column[token] for token in set(text) if token in column]] = 1.0
    folds = [Moments(features.shape[1], len(candidates)) for _ in range(FOLDS)]
    for number, fold in enumerate(folds):
        fold.add(features[number::FOLDS], present[number::FOLDS])
    _, errors = best_penalty(folds)
    r2 = (1 - errors / sum_of(folds).variances()).tolist()
    found = {token: value for token, value in zip(candidates, r2, strict=True) if value > LEAST_R2}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def best_penalty(folds: Sequence[Moments]) -> tuple[float, Tensor]:
    """Return the penalty with the smallest cross-validated error, and its mean squared errors (outputs,).

    Args:
        folds: the moments of each part of the samples.
    """
    tried = {penalty: _cross_validated(folds, penalty) for penalty in PENALTIES}
    best = min(tried, key=lambda penalty: float(tried[penalty].sum()))
    return best, tried[best]


def _cross_validated(folds: Sequence[Moments], penalty: float) -> Tensor:
    """Return the mean squared errors (outputs,) of each fold under the solution of the others."""
    total = sum(fold.count for fold in folds)
    parts = []
    for held in folds:
        others = sum_of([fold for fold in folds if fold is not held])
        if held.count and others.count:
            parts.append(held.errors(*others.solve(penalty)) * (held.count / total))
    return torch.stack(parts).sum(0)


def sum_of(folds: Sequence[Moments]) -> Moments:
    """Return the moments of the samples of all parts."""
    return functools.reduce(Moments.__add__, folds)
