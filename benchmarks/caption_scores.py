"""Times BLEU-1..4, ROUGE-L and CIDEr-D over an answer file, next to pycocoevalcap's Python parts. Prints one JSON line.

`python benchmarks/caption_scores.py [--rows 10000]`; pycocoevalcap is compared if it is installed (extra
`benchmarks`). Both get the same words, since its tokenizer is a Java program; ours takes part in `tokens_seconds`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))
from minigpt4.evaluation.scorers.captions import bleu, cider_d, rouge_l
from minigpt4.evaluation.scorers.tokens import tokenize

WORDS = [
    "a",
    "an",
    "the",
    "man",
    "woman",
    "dog",
    "cat",
    "red",
    "blue",
    "small",
    "large",
    "riding",
    "standing",
    "sitting",
    "on",
    "in",
    "with",
    "next",
    "to",
    "of",
    "street",
    "table",
    "bus",
    "train",
    "field",
    "people",
    "group",
    "two",
    "three",
    "holding",
    "looking",
    "at",
    "camera",
    "front",
    "building",
    "near",
    "water",
    "beach",
    "plate",
    "food",
]


def rows(number: int) -> tuple[list[str], list[list[str]]]:
    """Return captions of 8 to 14 words and five references each; a third of the words are shared."""
    draw = random.Random(0)
    found, known = [], []
    for _ in range(number):
        topic = draw.choices(WORDS, k=6)
        texts = [" ".join(draw.choices([*topic, *WORDS[:12]], k=draw.randint(8, 14))) + "." for _ in range(6)]
        found.append(texts[0])
        known.append(texts[1:])
    return found, known


def timed(work: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Return the seconds that `work` takes, and what it returns."""
    started = time.perf_counter()
    values = work()
    return time.perf_counter() - started, values


def main() -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    texts, references = rows(arguments.rows)
    started = time.perf_counter()
    found = [tokenize(text) for text in texts]
    known = [[tokenize(text) for text in each] for each in references]
    result: dict[str, object] = {"rows": arguments.rows, "tokens_seconds": round(time.perf_counter() - started, 2)}

    def ours() -> list[float]:
        rouge = np.mean([rouge_l(words, each) for words, each in zip(found, known, strict=True)])
        return [*(s.value() for s in bleu(found, known)), float(rouge), float(cider_d(found, known).mean())]

    works = {"ours": ours}
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        result["pycocoevalcap"] = "not installed"
    else:
        theirs_known = {n: [" ".join(words) for words in each] for n, each in enumerate(known)}
        theirs_found = {n: [" ".join(words)] for n, words in enumerate(found)}

        def theirs() -> list[float]:
            four = Bleu(4).compute_score(theirs_known, theirs_found, verbose=0)[0]
            others = [scorer.compute_score(theirs_known, theirs_found)[0] for scorer in (Rouge(), Cider())]
            return [*map(float, four), *map(float, others)]

        works["pycocoevalcap"] = theirs
    times: dict[str, list[float]] = {name: [] for name in works}
    values: dict[str, list[float]] = {}
    for _ in range(arguments.repeats):  # interleaved, since the machine's speed changes
        for name, work in works.items():
            seconds, values[name] = timed(work)
            times[name].append(seconds)
    result |= {f"{name}_seconds": round(statistics.median(each), 2) for name, each in times.items()}
    if "pycocoevalcap" in times:
        ratios = [b / a for a, b in zip(times["ours"], times["pycocoevalcap"], strict=True)]
        result["times_faster"] = round(statistics.median(ratios), 2)
        pairs = zip(values["ours"], values["pycocoevalcap"], strict=True)
        result["largest_difference"] = max(abs(a - b) for a, b in pairs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
