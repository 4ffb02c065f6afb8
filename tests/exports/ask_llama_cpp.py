"""What llama.cpp computes and answers with an exported file; run in a process of its own, which it may abort."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_cpp_py_sync import Llama, MultimodalContext


def run(case: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "flash_attn_type": 0}
    llama = Llama(case["llm"], n_ctx=512, n_threads=1, **whole)
    context = MultimodalContext(llama, case["mmproj"], use_gpu=False, n_threads=1, flash_attn_type=0, warmup=False)
    images = [("image/png", Path(path).read_bytes()) for path in case["images"]]
    ids: list[int] = []
    embeds = []
    with context.tokenize_prompt(case["prompt"].replace("<image>", context.marker), images) as prompt:
        for chunk in prompt:
            if chunk.type == "image":
                embeds.append(torch.tensor(chunk.embeddings))
                ids += [-1] * chunk.n_tokens
            else:
                ids += chunk.text_tokens
        place = context.evaluate_prompt(prompt)
    greedy = []
    for _ in range(case["tokens"]):
        logits = np.frombuffer(
            llama._ffi.buffer(llama._lib.llama_get_logits_ith(llama._ctx, -1), 4 * llama.n_vocab), "f4"
        )
        greedy.append(int(logits.argmax()))
        place = llama._eval_tokens([greedy[-1]], place)
    context.close()
    llama.close()
    return {"ids": ids, "embeds": torch.stack(embeds), "greedy": greedy}


def raw(case: dict[str, Any]) -> dict[str, Any]:
    """The chunks of a prompt of one image as llama.cpp makes them: the wheel's own reader refuses all but one."""
    llama = Llama(case["llm"], n_ctx=512, n_threads=1)
    context = MultimodalContext(llama, case["mmproj"], use_gpu=False, n_threads=1, flash_attn_type=0, warmup=False)
    ffi, lib = context._ffi, context._lib
    chunks, bitmap = lib.mtmd_input_chunks_init(), context.load_image_file(case["images"][0])
    text = case["prompt"].replace("<image>", context.marker).encode()
    given = ffi.new("mtmd_input_text *")
    given.text = buffer = ffi.new("char[]", text)  # kept until it was read
    given.text_len, given.add_special, given.parse_special = len(text), False, True
    assert lib.mtmd_tokenize(context._ctx, chunks, given, ffi.new("const mtmd_bitmap *[]", [bitmap]), 1) == 0
    del buffer
    ids: list[int] = []
    embeds = []
    for n in range(lib.mtmd_input_chunks_size(chunks)):
        chunk = lib.mtmd_input_chunks_get(chunks, n)
        size = ffi.new("size_t *")
        tokens = lib.mtmd_input_chunk_get_tokens_text(chunk, size)
        if tokens != ffi.NULL:
            ids += [int(tokens[k]) for k in range(size[0])]
            continue
        assert lib.mtmd_encode_chunk(context._ctx, chunk) == 0
        values = lib.mtmd_get_output_embd(context._ctx)
        shape = (int(lib.mtmd_input_chunk_get_n_tokens(chunk)), llama.n_embd)
        array = np.frombuffer(ffi.buffer(values, 4 * shape[0] * shape[1]), "f4").reshape(shape)
        embeds.append(torch.tensor(array.copy()))
    return {"ids": ids, "embeds": torch.stack(embeds)}


def main(cases_file: str, results_file: str) -> None:
    cases = torch.load(cases_file)
    torch.save({name: (raw if case.get("raw") else run)(case) for name, case in cases.items()}, results_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
