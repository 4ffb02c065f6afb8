"""Vision tower and projector as one GGUF file, for llama.cpp and the GGUF of the unchanged language model.

Input: a loaded model with a CLIP or SigLIP tower. Output: a folder with `mmproj.gguf`, the chat template of training
and a README with the command for `llama-server`. The projector type is `mlp`, llama.cpp's graph of LLaVA: two layers
with GELU; a linear projector is written as two such layers that compute the same (see `linear_projector`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minigpt4.checkpoints.assemble import LoadedModel
from minigpt4.errors import MissingDependencyError
from minigpt4.exports.fitting import check_fits
from minigpt4.exports.linear_projector import gelu_layers
from minigpt4.exports.mmproj_card import mmproj_card
from minigpt4.exports.stock_processor import IMAGE_TOKEN, own_chat_template, tokenizer_with_image
from minigpt4.exports.writing import write_complete
from minigpt4.models.projector import Mlp

Numbers = Literal["f32", "f16", "q8_0"]
NUMBERS: tuple[Numbers, ...] = ("f32", "f16", "q8_0")
FILE = "mmproj.gguf"
TEMPLATE = "chat_template.jinja"
_BLOCK = 32
"""Values that q8_0 scales together."""
_FULL = ("v.class_embd", "v.position_embd.weight")
"""What llama.cpp adds to float32 tensors."""
_TOP = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_IN_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
"""transformers' names of CLIP and SigLIP, and llama.cpp's."""


def export_mmproj(loaded: LoadedModel, out: Path, numbers: Numbers = "f16") -> None:
    """Write the folder `out`.

    Args:
        loaded: the model and what belongs to it, on any device.
        out: must not exist.
        numbers: how matrices are stored; norms, biases and position embeddings are always in float32.

    Raises:
        MissingDependencyError: gguf is not installed.
        ExportError: the model does not fit, or `out` exists or cannot be written.
    """
    check_fits(loaded, "mmproj")
    with write_complete(out) as partial:
        partial.mkdir()
        write_mmproj(loaded, partial / FILE, out.name, numbers)
        bos = str(tokenizer_with_image(loaded).tokenizer.bos_token or "")
        (partial / TEMPLATE).write_text(own_chat_template(loaded, IMAGE_TOKEN, bos), encoding="utf-8")
        (partial / "README.md").write_text(mmproj_card(loaded, out.name, numbers), encoding="utf-8")


def write_mmproj(loaded: LoadedModel, file: Path, name: str, numbers: Numbers) -> None:
    """Write the GGUF file alone, of a model with a CLIP or SigLIP tower, `patches` and a linear projector or an mlp.

    Args:
        loaded: the model.
        file: is overwritten.
        name: of the model, in the file.
        numbers: see `export_mmproj`.

    Raises:
        MissingDependencyError: gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError("gguf", "export --to mmproj", "mini") from error
    writer = gguf.GGUFWriter(file, "clip")
    _write_settings(writer, loaded, name)
    for tensor_name, tensor in _tensors(loaded):
        _add(writer, tensor_name, tensor, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_settings(writer: Any, loaded: LoadedModel, name: str) -> None:
    """Write the sizes that llama.cpp builds its graph from."""
    encoder: Any = loaded.model.vision_encoder
    own, spec = encoder.tower.config, encoder.image_spec
    blocks = _num_blocks(encoder)
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(loaded.model.language_model.hidden_size)
    writer.add_vision_image_size(own.image_size)
    writer.add_vision_patch_size(own.patch_size)
    writer.add_vision_embedding_length(own.hidden_size)
    writer.add_vision_feed_forward_length(own.intermediate_size)
    writer.add_vision_block_count(blocks)
    writer.add_vision_head_count(own.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(own.layer_norm_eps)
    writer.add_vision_image_mean(list(spec.mean))
    writer.add_vision_image_std(list(spec.std))
    writer.add_vision_use_gelu(own.hidden_act != "quick_gelu")
    # Without this, llama.cpp leaves out the last block of a LLaVA; with it, it stops behind the block of this number.
    writer.add_array("clip.vision.feature_layer", [blocks])


def _num_blocks(encoder: Any) -> int:
    """Return the number of blocks up to the one whose hidden states are used."""
    return int(encoder.tower.config.num_hidden_layers + 1 + encoder.settings["layer"])


def _tensors(loaded: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under its name in llama.cpp; the final norm and the blocks behind `layer` have none."""
    encoder: Any = loaded.model.vision_encoder
    for name, tensor in encoder.tower.state_dict().items():
        if name in _TOP:
            yield _TOP[name], tensor
        elif name.startswith("encoder.layers."):
            number, rest = name.removeprefix("encoder.layers.").split(".", 1)
            module, _, leaf = rest.rpartition(".")
            yield f"v.blk.{number}.{_IN_BLOCK[module]}.{leaf}", tensor
    yield from _projector(loaded.model.llama_proj)


def _projector(projector: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the two layers of the projector, both with a bias: llama.cpp adds them unasked."""
    if isinstance(projector, Mlp):
        tensors = dict(projector.state_dict())
    else:
        tensors = gelu_layers(projector, hidden=2 * projector.in_features)
    for number, layer in ((0, "linear_1"), (2, "linear_2")):
        weight = tensors[f"{layer}.weight"]
        yield f"mm.{number}.weight", weight
        yield f"mm.{number}.bias", tensors.get(f"{layer}.bias", weight.new_zeros(len(weight)))


def _add(writer: Any, name: str, tensor: Tensor, numbers: Numbers) -> None:
    """Add one tensor in the precision that its place in the graph allows."""
    import gguf

    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    is_matrix = values.ndim > 1 and name not in _FULL
    if not is_matrix or numbers == "f32":
        writer.add_tensor(name, values)
    elif numbers == "q8_0" and values.ndim == 2 and values.shape[1] % _BLOCK == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values.astype("float16"))
