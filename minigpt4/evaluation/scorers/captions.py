"""Captions against references: BLEU-1..4, ROUGE-L, CIDEr-D, lengths, as in the COCO caption evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from minigpt4.evaluation.scorers.answers import Row
from minigpt4.evaluation.scorers.tokens import tokenize
from minigpt4.evaluation.statistics import Array, Statistic, mean

Words = Sequence[str]
N = 4
BETA = 1.2
"""Weight of recall in ROUGE-L."""
SIGMA = 6.0
"""Width, in words, of CIDEr-D's penalty for another length."""
_TINY, _SMALL = 1e-15, 1e-9
"""What the reference implementation adds to counts, so that a caption without any match has a score."""


def captions(rows: Sequence[Row]) -> list[Statistic]:
    """Score `answer` against `truth.captions`."""
    found = [tokenize(row["answer"]) for row in rows]
    references = [[tokenize(each) for each in row["truth"]["captions"]] for row in rows]
    return [
        *bleu(found, references),
        mean("ROUGE-L", [rouge_l(words, known) for words, known in zip(found, references, strict=True)]),
        mean("CIDEr-D", cider_d(found, references)),
        mean("words", [len(row["answer"].split()) for row in rows]),
    ]


def ngrams(words: Words) -> list[Counter[tuple[str, ...]]]:
    """Return how often each n-gram occurs, for n = 1 to 4."""
    return [Counter(zip(*(words[k:] for k in range(n)), strict=False)) for n in range(1, N + 1)]


def bleu(found: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[Statistic]:
    """Return BLEU-1 to BLEU-4 of a corpus, with the reference length that is closest to each caption's."""
    columns = np.zeros((len(found), 2 * N + 2))
    for place, (words, known) in enumerate(zip(found, references, strict=True)):
        counts = [ngrams(each) for each in known]
        for n, own in enumerate(ngrams(words)):
            columns[place, n] = sum(min(number, max(c[n][gram] for c in counts)) for gram, number in own.items())
            columns[place, N + n] = max(0, len(words) - n)
        columns[place, 2 * N] = len(words)
        columns[place, 2 * N + 1] = min((abs(len(each) - len(words)), len(each)) for each in known)[1]
    return [Statistic(f"BLEU-{n}", columns, _bleu_formula(n)) for n in range(1, N + 1)]


def _bleu_formula(order: int) -> Callable[[Array], Array]:
    def formula(sums: Array) -> Array:
        precision = np.ones(sums.shape[:-1])
        for n in range(order):
            precision = precision * ((sums[..., n] + _TINY) / (sums[..., N + n] + _SMALL))
        ratio = (sums[..., 2 * N] + _TINY) / (sums[..., 2 * N + 1] + _SMALL)
        brevity = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
        value: Array = precision ** (1 / order) * brevity
        return value

    return formula


def rouge_l(words: Words, references: Sequence[Words]) -> float:
    """Return ROUGE-L of one caption: the best precision and the best recall of a longest common subsequence."""
    # The reference implementation counts an empty caption as one word.
    common = [longest_common(words, each) for each in references]
    precision = max(common) / max(1, len(words))
    recall = max(size / max(1, len(each)) for size, each in zip(common, references, strict=True))
    if not precision or not recall:
        # Two empty captions are equal words in the reference implementation.
        return 1.0 if not words and any(not each for each in references) else 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(one: Words, other: Words) -> int:
    """Return the length of the longest common subsequence; one machine word per row of the table (bit-parallel)."""
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(one) - row.bit_count()


def cider_d(found: Sequence[Words], references: Sequence[Sequence[Words]]) -> Array:
    """Return (N,) CIDEr-D of each caption, times 10; document frequencies are those of the references given here."""
    grams = [[ngrams(each) for each in known] for known in references]
    documents: Counter[tuple[str, ...]] = Counter()
    for known in grams:
        documents.update({gram for each in known for counts in each for gram in counts})
    log_total = math.log(len(grams)) if grams else 0.0
    weight = {gram: log_total - math.log(number) for gram, number in documents.items()}
    scores = np.zeros(len(found))
    for place, (words, known) in enumerate(zip(found, grams, strict=True)):
        own, own_norms = _weighted(ngrams(words), weight, log_total)
        total = 0.0
        for each, reference in zip(known, references[place], strict=True):
            theirs, norms = _weighted(each, weight, log_total)
            # Lengths are counted in pairs of words, as in the reference implementation.
            gap = max(0, len(words) - 1) - max(0, len(reference) - 1)
            penalty = math.exp(-(gap**2) / (2 * SIGMA**2))
            for n in range(N):
                common = theirs[n]
                value = sum(min(w, common[g]) * common[g] for g, w in own[n].items() if g in common)
                if own_norms[n] and norms[n]:
                    value /= own_norms[n] * norms[n]
                total += value * penalty
        scores[place] = 10 * total / N / len(known)
    return scores


def _weighted(
    counts: Sequence[Counter[tuple[str, ...]]], weight: dict[tuple[str, ...], float], unseen: float
) -> tuple[list[dict[tuple[str, ...], float]], list[float]]:
    vectors = [{gram: number * weight.get(gram, unseen) for gram, number in each.items()} for each in counts]
    return vectors, [math.sqrt(sum(value * value for value in each.values())) for each in vectors]
