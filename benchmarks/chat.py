"""How fast chat is, on the mini model: prints one JSON line.

Three comparisons, each side by side in one process with equal precision and threads; the two sides take turns and the
median counts, so that other work on the machine weighs on both.

    first_token     seconds to the first token of a session's fifth turn, against reading the whole prompt again
    batch           seconds for 16 captions of 32 tokens, decoded together, against one by one
    stream          tokens per second of one stream, against `transformers.generate` of the same language model

    python benchmarks/chat.py [--dtype float32] [--threads 1] [--repeats 3] [--device cpu] [--only stream]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from PIL import Image, ImageDraw

from minigpt4 import Chat, load_model
from minigpt4.chat.engine import Engine, Prompt
from minigpt4.chat.section import ChatSection
from minigpt4.chat.session import Session
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.conversation.dialogue import Dialogue, Turn

TOKENS = 32
BATCH = 16
TURNS = 5
FIRST_PROMPT, NEW_PER_TURN = 100, 46
DESCRIBE = "Describe this image in detail."


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=list(PARTS), nargs="+", default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = [f"model.language_model.dtype={arguments.dtype}", "model.language_model.attn_implementation=sdpa"]
    loaded = load_model("mini", [*options, "conversation.isolate_turns=false"], arguments.device)  # all turns are read
    endless(loaded)
    result: dict[str, Any] = {"dtype": arguments.dtype, "threads": arguments.threads, "device": arguments.device}
    Chat(loaded, ChatSection(max_new_tokens=4)).session([picture(0)]).ask(DESCRIBE)  # the first pass is slower
    for name in arguments.only:
        result[name] = PARTS[name](loaded, arguments.repeats)
    print(json.dumps(result))


def endless(loaded: LoadedModel) -> None:
    """Let nothing end an answer before its length: no end token, no end mark."""
    encoder = loaded.encoder
    encoder.training_template = replace(encoder.training_template, end="")
    encoder.tokenizer.eos_id = None
    loaded.model.language_model.model.generation_config.eos_token_id = None


def first_token(loaded: LoadedModel, repeats: int) -> dict[str, Any]:
    """Time the fifth turn of a conversation whose prompts grow from 100 to 284 tokens.

    Answers of one token, so that all 46 new tokens of a turn have to be read; those of a longer answer would be known.
    """
    chat = Chat(loaded, ChatSection(max_new_tokens=1))
    session = chat.session([picture(0)])
    for turn in range(TURNS - 1):
        session.ask(question_of(session, FIRST_PROMPT + NEW_PER_TURN * turn))
    question = question_of(session, FIRST_PROMPT + NEW_PER_TURN * (TURNS - 1))
    reports = []

    def cached() -> None:
        branch = session.branch()
        with_cache.start()
        next(branch.stream(question, max_new_tokens=1), None)
        reports.append(branch.last)

    def again() -> None:
        branch = session.branch()
        branch._memory.forget()
        without.start()
        next(branch.stream(question, max_new_tokens=1), None)

    with_cache, without = Clock(), Clock()
    alternate(repeats, (with_cache, cached), (without, again))
    return {
        "prompt_tokens": reports[0].prompt_tokens,
        "prefilled_tokens": reports[0].prefilled_tokens,
        "cached_seconds": with_cache.median,
        "again_seconds": without.median,
        "times_sooner": round(without.median / with_cache.median, 2),
    }


def question_of(session: Session, length: int) -> str:
    """Return a question with which the session's prompt has `length` tokens."""
    encoder, words = session.engine.loaded.encoder, 1
    while True:
        question = " ".join(["word"] * words)
        asked = Turn(session._with_images(question, len(session.pictures) - session.dialogue.num_image_marks))
        dialogue = Dialogue((*session.turns, asked))
        if len(encoder.encode_prompt(dialogue, num_images=len(session.pictures)).input_ids) >= length:
            return question
        words += 1


def batch(loaded: LoadedModel, repeats: int) -> dict[str, Any]:
    """Time captions, encoding of the images included."""
    engine, settings = Engine(loaded), ChatSection(max_new_tokens=TOKENS)
    pictures = [picture(n) for n in range(BATCH)]

    def captions(images: list[Image.Image]) -> None:
        features = engine.query_features(images)
        prompts = [Prompt(Dialogue((Turn(DESCRIBE),)), one.unsqueeze(0)) for one in features]
        for answer in engine.decode(prompts, settings):
            if len(answer.ids) != TOKENS:
                raise SystemExit(f"an answer ended after {len(answer.ids)} tokens")

    together, alone = Clock(), Clock()
    alternate(repeats, (together, lambda: captions(pictures)), (alone, lambda: [captions([p]) for p in pictures]))
    return {
        "captions": BATCH,
        "tokens": TOKENS,
        "together_seconds": together.median,
        "one_by_one_seconds": alone.median,
        "times_faster": round(alone.median / together.median, 2),
    }


def stream(loaded: LoadedModel, repeats: int) -> dict[str, Any]:
    """Time greedy answers to a question without an image, as text comes out of a stream and as `generate` returns."""
    engine, settings = Engine(loaded), ChatSection(max_new_tokens=2 * TOKENS)
    prompt = Prompt(Dialogue((Turn("Tell me a story about a dog, a cat and the sea."),)))
    ids = loaded.encoder.encode_prompt(prompt.dialogue, num_images=0).input_ids.unsqueeze(0).to(loaded.model.device)
    llm, streamed, generated = loaded.model.language_model.model, Clock(), Clock()
    texts: dict[str, str] = {}

    def ours() -> None:
        texts["ours"] = "".join(engine.stream(prompt, settings))

    def theirs() -> None:
        with torch.inference_mode():
            out = llm.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=2 * TOKENS, do_sample=False, pad_token_id=0
            )
        texts["theirs"] = loaded.encoder.tokenizer.decode(out[0, ids.shape[1] :].tolist(), keep_special=True).strip()

    alternate(repeats, (streamed, ours), (generated, theirs))
    return {
        "tokens": 2 * TOKENS,
        "tokens_per_second": round(2 * TOKENS / streamed.median, 2),
        "generate_tokens_per_second": round(2 * TOKENS / generated.median, 2),
        "times_faster": round(generated.median / streamed.median, 2),
        "same_text": texts["ours"] == texts["theirs"],
    }


class Clock:
    """Seconds of each repetition."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def start(self) -> None:
        """Start anew, when what came before is not to count."""
        self.started = time.perf_counter()

    def stop(self) -> None:
        """Note the seconds since the start."""
        self.seconds.append(time.perf_counter() - self.started)

    @property
    def median(self) -> float:
        """Of all repetitions, in seconds."""
        return round(statistics.median(self.seconds), 4)


def alternate(repeats: int, *sides: tuple[Clock, Callable[[], object]]) -> None:
    """Run the sides in turns."""
    for _ in range(repeats):
        for clock, run in sides:
            clock.start()
            run()
            clock.stop()


def picture(number: int) -> Image.Image:
    """Return a coloured shape."""
    canvas = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(canvas)
    colour = ("red", "green", "blue", "orange")[number % 4]
    box = (10 + number % 5, 12, 50, 50 - number % 7)
    (draw.ellipse if number % 2 else draw.rectangle)(box, fill=colour)
    return canvas


PARTS: dict[str, Callable[[LoadedModel, int], dict[str, Any]]] = {
    "first_token": first_token,
    "batch": batch,
    "stream": stream,
}

if __name__ == "__main__":
    main()
