"""The settings of every registered part, one class each; `minigpt4.registry` says which part each belongs to.

They stand apart from the parts, so that a config is read without importing torch, transformers or timm.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from minigpt4.config.schema import FilePath, OneOf, settings
from minigpt4.registry import PROCESSORS, Component

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ASK_KINDS = ("what", "presence", "negated")
"""Kinds of questions that `EasyVQAConfig.ask` can draw."""


# Vision encoders ------------------------------------------------------------------------------------------------------


@settings
class EvaViTGConfig:
    """EVA-CLIP ViT-g/14 as MiniGPT-4 uses it; the default sizes are those of the published file."""

    weights: Annotated[str, FilePath()]
    """`eva_vit_g.pth`, a Hugging Face folder of BLIP-2, or `random`."""
    ln_vision_weights: Annotated[str, FilePath()] = ""
    """The file with `ln_vision` (the Q-Former's file, or a Hugging Face folder of BLIP-2). Empty: identity, as in the
    published LLaMA-2 variant."""
    image_size: Annotated[int, Ge(1)] = 224
    """Height and width of the input in pixels."""
    patch_size: Annotated[int, Ge(1)] = 14
    """Height and width of a patch in pixels."""
    embed_dim: Annotated[int, Ge(1)] = 1408
    """Dv, the width of a patch feature."""
    depth: Annotated[int, Ge(1)] = 39
    """Number of blocks; the published file has one more, which MiniGPT-4 leaves out."""
    num_heads: Annotated[int, Ge(1)] = 16
    """Attention heads per block."""
    mlp_ratio: Annotated[float, Gt(0)] = 4.3637
    """Width of the MLP divided by `embed_dim`."""
    dtype: Dtype = "auto"
    """Precision in which the frozen weights are held and the encoder computes; `auto` is bfloat16 where this machine is
    fast at it, else float32. Norms are computed in float32."""


@settings
class TimmConfig:
    """Any timm backbone that returns feature maps."""

    name: str
    """timm's name of the architecture, such as `vit_base_patch16_siglip_224` or `convnext_tiny`."""
    weights: Annotated[str, FilePath()]
    """A weight file, `asset:NAME`, or `random`; nothing is downloaded."""
    weights_match: Literal["names", "order"] = "names"
    """Match the tensors of the file by name, or by their order in the file."""
    image_size: Annotated[int, Ge(0)] = 0
    """Height and width of the input in pixels; 0 uses the backbone's own."""
    feature_levels: list[int] = field(default_factory=list)
    """Feature maps to join, by timm's index; empty uses the last one. Each map is layer-normalised over channels and
    averaged down to the coarsest grid."""
    mean: list[float] = field(default_factory=list)
    """Mean of the three channels for values in 0..1; empty uses the backbone's own."""
    std: list[float] = field(default_factory=list)
    """Standard deviation of the three channels; empty uses the backbone's own."""
    dtype: Dtype = "auto"
    """Precision in which the frozen weights are held and the encoder computes; `auto` is bfloat16 where this machine is
    fast at it, else float32. Norms are computed in float32."""


@settings
class TransformersEncoderConfig:
    """Any plain vision transformer of transformers: CLIP, SigLIP, SigLIP 2 of a fixed size, DINOv2, DINOv3, ViT."""

    path: Annotated[str, FilePath()]
    """A folder with config.json, weights and preprocessor_config.json. It may hold a whole CLIP or SigLIP: only the
    vision tower is loaded."""
    layer: Annotated[int, Le(-1)] = -2
    """Block whose hidden states are used, counted from the last: -1 is the last one, -2 the one before, as in LLaVA.
    The blocks behind it are not kept."""
    post_norm: bool = False
    """Apply the tower's final norm to them, as Idefics3 does with `layer: -1`; LLaVA does not."""
    class_token: Literal["drop", "keep"] = "drop"
    """What happens to class token and registers, if the tower has any, before the patches."""
    image_size: Annotated[int, Ge(0)] = 0
    """Height and width of the input in pixels; 0 uses that of the folder's image processor."""
    mean: list[float] = field(default_factory=list)
    """Mean of the three channels for values in 0..1; empty uses that of the folder's image processor."""
    std: list[float] = field(default_factory=list)
    """Standard deviation of the three channels; empty uses that of the folder's image processor."""
    dtype: Dtype = "float32"
    """Precision in which the frozen weights are stored."""


# Resamplers -----------------------------------------------------------------------------------------------------------


@settings
class QFormerConfig:
    """BLIP-2's Q-Former without its text branch; the default sizes are those of the published file."""

    weights: Annotated[str, FilePath()]
    """`blip2_pretrained_flant5xxl.pth`, a Hugging Face folder of BLIP-2, or `random`."""
    num_query_tokens: Annotated[int, Ge(1)] = 32
    """Q, the number of tokens per image."""
    hidden_size: Annotated[int, Ge(1)] = 768
    """Dq, the width of a query feature."""
    num_hidden_layers: Annotated[int, Ge(1)] = 12
    """Number of layers; every second one, starting with the first, attends to the patches."""
    num_attention_heads: Annotated[int, Ge(1)] = 12
    """Attention heads per layer."""
    intermediate_size: Annotated[int, Ge(1)] = 3072
    """Width of the feed-forward layers."""
    dtype: Dtype = "auto"
    """Precision in which the frozen weights are held and the Q-Former computes; `auto` is bfloat16 where this machine
    is fast at it, else float32. A trained Q-Former is held in float32."""


@settings
class MergeConfig:
    """Neighbouring patches joined into one feature, as the published LLaMA-2 variant does without a Q-Former."""

    neighbours: Annotated[int, Ge(1)] = 4
    """Consecutive patches joined to one query feature."""


@settings
class PatchesConfig:
    """Every feature of the encoder is a token of its own, as in LLaVA; it has no settings."""


@settings
class PixelShuffleConfig:
    """Squares of neighbouring patches joined into one feature, as Idefics3 and SmolVLM do."""

    factor: Annotated[int, Ge(1)] = 2
    """Rows and columns of a square; Q is the number of patches divided by its square."""


@settings
class PoolConfig:
    """Patches averaged over a coarse grid; for small encoders."""

    grid: Annotated[int, Ge(1)] = 4
    """Rows and columns of the grid; Q is its square."""
    position_features: bool = True
    """Append a one-hot of the cell to its features, so that `llama_proj` has a bias of its own for each cell."""
    scale: float = 1.0
    """Factor on all features; below 1, a new `llama_proj` starts with outputs no larger than the token embeds."""


@settings
class PrefixConfig:
    """A visual prefix: every image token is made from the whole image; for small encoders and simple images."""

    num_query_tokens: Annotated[int, Ge(1)] = 16
    """Q, the number of tokens per image."""
    components: Annotated[int, Ge(1)] = 32
    """Principal directions of the images' features that are kept, each scaled to variance 1."""
    scale: float = 0.2
    """Factor on all features; a new `llama_proj` should start with outputs no larger than the token embeds."""


# Projectors ----------------------------------------------------------------------------------------------------------


@settings
class LinearConfig:
    """One linear layer, as in MiniGPT-4."""

    bias: bool = True
    """Whether the layer adds a bias; Idefics3's has none."""


@settings
class MlpConfig:
    """Two linear layers with GELU between them, as in LLaVA-1.5; both are as wide as the language model."""

    bias: bool = True
    """Whether both layers add a bias."""


# Language models ------------------------------------------------------------------------------------------------------


@settings
class LoraConfig:
    """Low-rank adapters inside the language model (needs the extra `lora`)."""

    rank: Annotated[int, Ge(0)] = 0
    """Rank of the adapters; 0 adds none."""
    alpha: float = 16.0
    """Scale: the output of the adapters is multiplied by alpha / rank."""
    dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    """Dropout in front of the adapters, as a probability."""
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the linear layers that get an adapter."""


@settings
class LanguageModelConfig:
    """Any causal language model of transformers."""

    path: Annotated[str, FilePath()]
    """A folder with config.json, weights and tokenizer; or a GGUF file; or `asset:NAME`."""
    dtype: Dtype = "bfloat16"
    """Precision in which the weights are stored; `auto` is bfloat16 where this machine is fast at it, else float32."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel; `auto` is transformers' choice for the architecture, and see `run.measure_attention`."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""


# Processors -----------------------------------------------------------------------------------------------------------


@settings
class ImageProcessorConfig:
    """How images are fitted to the size of the vision encoder."""

    resize: Literal["stretch", "letterbox"] = "stretch"
    """`stretch` changes the proportions (published); `letterbox` keeps them and pads with white."""
    max_side: Annotated[int, Ge(0)] = 0
    """Images with a side longer than this, in pixels, are shrunk to it first; 0 turns this off. For a model trained on
    small images only: a large one has sharper edges than any it has seen."""
    max_pixels: Annotated[int, Ge(1)] = 100_000_000
    """Largest image decoded, in pixels, as a guard against decompression bombs (PIL itself refuses above
    178,956,970)."""


@settings
class TextProcessorConfig:
    """Strip both ends of a text."""

    max_words: Annotated[int, Ge(0)] = 0
    """Longest text in words, the rest is cut; 0 keeps everything."""


@settings
class BlipCaptionConfig(TextProcessorConfig):
    """BLIP's caption cleaning."""

    max_words: Annotated[int, Ge(0)] = 50
    """Longest caption in words, the rest is cut; 0 keeps everything."""


# Data sets ------------------------------------------------------------------------------------------------------------


@settings
class SourceConfig:
    """The settings that every data set has."""

    weight: Annotated[float, Gt(0)] = 1.0
    """Share in the mixture, relative to the weights of the other data sets."""
    text: Annotated[Component, OneOf(PROCESSORS, default="text")] = field(
        default_factory=lambda: Component(PROCESSORS, "text", TextProcessorConfig())
    )
    """The text processor for the captions and answers of this data set."""


@settings
class WebPairsConfig(SourceConfig):
    """WebDataset shards of images and captions, as img2dataset writes them."""

    urls: Annotated[list[str], FilePath()]
    """Paths of tar files; `{00000..00010}` and `*` are expanded."""
    caption_key: str = "caption"
    """The key of a sample's json file that holds the caption; without one, its txt file is the caption."""
    shuffle_buffer: Annotated[int, Ge(0)] = 1000
    """Samples held for shuffling, per reader and not yet decoded; 0 keeps the order of the shards."""


@settings
class AlignedPairsConfig(SourceConfig):
    """The aligned set of stage 2, as its authors publish it (cc_sbu_align)."""

    path: Annotated[str, FilePath()]
    """The folder with `filter_cap.json` and `image/`."""
    prompts: str = "alignment"
    """Instructions: the name of a shipped file in `prompts/`, or a path; one instruction per line. Empty: the caption
    alone."""


@settings
class ConversationsConfig(SourceConfig):
    """Your own rows of conversations or captions, in a JSON or JSONL file."""

    path: Annotated[str, FilePath()]
    """A `.json` file with a list of rows, or a `.jsonl` file with one row per line."""
    image_dir: Annotated[str, FilePath()] = ""
    """The folder that image paths are relative to; empty: the folder of the file."""
    images: Literal["required", "optional"] = "required"
    """`required`: a file in which not one row has an image is an error; single rows may be text only. `optional`: the
    file may be text only."""
    prompts: str = "alignment"
    """Instructions for plain captions: a shipped file in `prompts/`, or a path. Empty: the caption alone."""


@settings
class EasyVQAConfig(SourceConfig):
    """easy-VQA: images of one coloured shape, and questions about them."""

    path: Annotated[str, FilePath()]
    """The folder with `train/` and `test/`, or `asset:NAME`."""
    split: Literal["train", "test"] = "train"
    """The part of the data set."""
    form: Literal["captions", "questions", "conversations"]
    """`captions`: a short caption, no question. `questions`: turns that each stand alone. `conversations`: the
    questions and a description of the image, in any order."""
    questions_per_image: Annotated[int, Ge(0)] = 0
    """Questions drawn per sample; 0 uses all questions of the image."""
    image_range: tuple[int, int] = (0, 0)
    """Images from the first number up to, not including, the second; (0, 0) uses all."""
    ask: dict[str, Annotated[int, Ge(0)]] = field(default_factory=dict)
    """Questions of each kind per image, in place of `questions_per_image`. `what`: at most this many of its own.
    `presence` and `negated` ("is there not a red shape?"), even numbers: half about what is in the image, half about
    what is not. Five of six questions of the data set ask for what is not there, so a model can score well without
    looking at the image."""
    prompts: str = "alignment"
    """Instructions answered by a description (`conversations` only): a shipped file in `prompts/`, or a path."""

    def __post_init__(self) -> None:
        """Check what depends on several fields."""
        first, end = self.image_range
        if self.image_range != (0, 0) and not 0 <= first < end:
            raise ValueError(f"image_range must be (first, end) with 0 <= first < end, found {self.image_range}")
        if not self.ask:
            return
        if self.questions_per_image or self.form == "captions":
            raise ValueError("ask cannot be combined with questions_per_image or with form: captions")
        unknown = [kind for kind in self.ask if kind not in ASK_KINDS]
        if unknown:
            raise ValueError(f"ask: unknown kind {unknown[0]!r}; the kinds are {', '.join(ASK_KINDS)}")
        if not any(self.ask.values()):
            raise ValueError("ask: every number is 0, so there are no questions")
        odd = [kind for kind, number in self.ask.items() if kind != "what" and number % 2]
        if odd:
            raise ValueError(f"ask.{odd[0]} must be even, found {self.ask[odd[0]]}")


@settings
class CrossedVQAConfig(SourceConfig):
    """easy-VQA in pairs of images that are asked the same questions, with opposite answers: the model has to compare
    image and question from the first step on. In groups of eight, one image of each colour."""

    path: Annotated[str, FilePath()]
    """The folder with `train/` and `test/`, or `asset:NAME`."""
    split: Literal["train", "test"] = "train"
    """The part of the data set."""
    image_range: tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)]] = (0, 0)
    """Images from the first number up to, not including, the second; (0, 0) uses all."""
    what: Annotated[int, Ge(0)] = 1
    """Questions for the colour or the shape per image, at most its own."""
    described: Annotated[float, Ge(0), Le(1)] = 0.2
    """Share of the images that are described, too."""
    negated: Annotated[float, Ge(0), Le(1)] = 0.5
    """Share of the pairs whose questions are negated ("is there not a red shape?")."""
    negated_after: Annotated[int, Ge(0)] = 0
    """Samples of the stream before the first negated question: they are easier once the plain ones are known."""
    prompts: str = "alignment"
    """Instructions answered by a description: a shipped file in `prompts/`, or a path."""
