"""How fast chat is, on the mini model: prints one JSON line.

Three comparisons, each in one process with equal precision and threads. The two sides take turns and the median counts,
so that other work on the machine affects both.

    first_token     seconds to the first token of a session's fifth turn, compared with reading the whole prompt again
    batch           seconds for 16 captions of 32 tokens, decoded together, compared with one by one
    stream          tokens per second of one stream, compared with `transformers.generate` of the same language model

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
from minigpt4.chat.session import Session
from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.config.sections import ChatConfig
from minigpt4.conversation.dialogue import Dialogue, Turn, images_first

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
    Chat(loaded, ChatConfig(max_new_tokens=4)).session([picture(0)]).ask(DESCRIBE)  # the first pass is slower
    for name in arguments.only:
        result[name] = PARTS[name](loaded, arguments.repeats)
    print(json.dumps(result))


def endless(loaded: LoadedModel) -> None:
    """Remove the end tokens and the end mark, so that every answer has its full length."""
    encoder = loaded.conversation
    encoder.training_template = replace(encoder.training_template, end="")
    encoder.tokenizer.eos_id = None
    loaded.model.language_model.model.generation_config.eos_token_id = None


def first_token(loaded: LoadedModel, repeats: int) -> dict[str, Any]:
    """Time the fifth turn of a conversation whose prompts grow from 100 to 284 tokens.

    Answers have one token, so that all 46 new tokens of a turn are read; a longer answer would already be in the cache.
    """
    chat = Chat(loaded, ChatConfig(max_new_tokens=1))
    session = chat.session([picture(0)])
    for turn in range(TURNS - 1):
        session.ask(question_of(session, FIRST_PROMPT + NEW_PER_TURN * turn))
    question = question_of(session, FIRST_PROMPT + NEW_PER_TURN * (TURNS - 1))
    reports: list[Any] = []

    def first(keep_cache: bool) -> float:
        branch = session.branch()
        if not keep_cache:
            branch._prefix.clear()
        seconds = seconds_of(next, branch.stream(question, max_new_tokens=1), None)
        reports.append(branch.last)
        return seconds

    again, cached = medians(repeats, lambda: first(False), lambda: first(True))
    return {
        "prompt_tokens": reports[-1].prompt_tokens,
        "prefilled_tokens": reports[-1].prefilled_tokens,
        "cached_seconds": cached,
        "again_seconds": again,
        "times_sooner": round(again / cached, 2),
    }


def question_of(session: Session, length: int) -> str:
    """Return a question with which the session's prompt has `length` tokens."""
    encoder, words = session.engine.loaded.conversation, 1
    while True:
        question = " ".join(["word"] * words)
        asked = images_first(question, len(session.pictures) - session.dialogue.num_image_marks)
        dialogue = Dialogue((*session.turns, Turn(asked)))
        if len(encoder.encode_prompt(dialogue, num_images=len(session.pictures)).input_ids) >= length:
            return question
        words += 1


def batch(loaded: LoadedModel, repeats: int) -> dict[str, Any]:
    """Time captions, with the encoding of the images."""
    engine, settings = Engine(loaded), ChatConfig(max_new_tokens=TOKENS)
    pictures = [picture(n) for n in range(BATCH)]

    def captions(images: list[Image.Image]) -> None:
        features = engine.query_features(images)
        prompts = [Prompt(Dialogue((Turn(DESCRIBE),)), one.unsqueeze(0)) for one in features]
        for answer in engine.decode(prompts, settings):
            if len(answer.ids) != TOKENS:
                raise SystemExit(f"an answer ended after {len(answer.ids)} tokens")

    together, one_by_one = medians(
        repeats,
        lambda: seconds_of(captions, pictures),
        lambda: seconds_of(lambda: [captions([one]) for one in pictures]),
    )
    return {
        "captions": BATCH,
        "tokens": TOKENS,
        "together_seconds": together,
        "one_by_one_seconds": one_by_one,
        "times_faster": round(one_by_one / together, 2),
    }


def stream(loaded: LoadedModel, repeats: int) -> dict[str, Any]:
    """Time greedy answers to a question without an image, as a stream and from `generate`."""
    chat, question = (
        Chat(loaded, ChatConfig(max_new_tokens=2 * TOKENS)),
        "Tell me a story about a dog, a cat and the sea.",
    )
    prompt = loaded.conversation.encode_prompt(Dialogue((Turn(question),)), num_images=0)
    ids = prompt.input_ids.unsqueeze(0).to(loaded.model.device)
    llm: Any = loaded.model.language_model.model
    texts: dict[str, str] = {}

    def ours() -> None:
        texts["ours"] = chat.session().ask(question)

    def theirs() -> None:
        with torch.inference_mode():
            out = llm.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=2 * TOKENS, do_sample=False, pad_token_id=0
            )
        texts["theirs"] = loaded.conversation.tokenizer.decode(
            out[0, ids.shape[1] :].tolist(), keep_special=True
        ).strip()

    streamed, generated = medians(repeats, lambda: seconds_of(ours), lambda: seconds_of(theirs))
    return {
        "tokens": 2 * TOKENS,
        "tokens_per_second": round(2 * TOKENS / streamed, 2),
        "generate_tokens_per_second": round(2 * TOKENS / generated, 2),
        "times_faster": round(generated / streamed, 2),
        "same_text": texts["ours"] == texts["theirs"],
    }


def medians(repeats: int, *sides: Callable[[], float]) -> list[float]:
    """Run the sides alternately and return the median seconds of each."""
    seconds = [[side() for side in sides] for _ in range(repeats)]
    return [round(statistics.median(each), 4) for each in zip(*seconds, strict=True)]


def seconds_of(run: Callable[..., object], *arguments: Any) -> float:
    """Run a function and return its seconds."""
    started = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started


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
