"""The whole configuration on one page: `Config` and its sections, with type, default and meaning of every key."""

from __future__ import annotations

from dataclasses import field
from functools import cached_property
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from minigpt4.config.parts import ImageProcessorConfig
from minigpt4.config.schema import FilePath, NameIn, OneOf, plain, settings
from minigpt4.config.sources import to_yaml
from minigpt4.registry import (
    DATASETS,
    LANGUAGE_MODELS,
    MODELS,
    PROCESSORS,
    RESAMPLERS,
    RUNNERS,
    TEMPLATES,
    VISION_ENCODERS,
    Component,
)

Device = Literal["auto", "cpu", "cuda", "mps"]
OWN_TEMPLATE = "tokenizer"
"""The name in `conversation.template` for the chat template of the language model's tokenizer."""


@settings
class ModelConfig:
    """The parts of the model, and which of them are trained."""

    type: Annotated[str, NameIn(MODELS)] = "minigpt4"
    """Name of the model class."""
    vision_encoder: Annotated[Component, OneOf(VISION_ENCODERS)]
    """The image encoder."""
    resampler: Annotated[Component, OneOf(RESAMPLERS)]
    """Turns patch features into query features."""
    language_model: Annotated[Component, OneOf(LANGUAGE_MODELS, default="causal_lm")]
    """The language model."""
    trainable: list[str] = field(default_factory=lambda: ["llama_proj"])
    """Parts that are trained: llama_proj, resampler, vision_encoder, lora, language_model."""
    init_from: Annotated[str, FilePath()] = ""
    """Checkpoint whose trained parts are the starting point: stage 1, for stage 2."""


@settings
class ProcessorsConfig:
    """How images are prepared; text processors belong to each data set."""

    image: Annotated[Component, OneOf(PROCESSORS, default="image")] = field(
        default_factory=lambda: Component(PROCESSORS, "image", ImageProcessorConfig())
    )
    """Turns an image into the tensor that the vision encoder takes."""


@settings
class ConversationConfig:
    """How dialogues become tokens; saved with every checkpoint, and the same in chat."""

    template: Annotated[str, NameIn(TEMPLATES, (OWN_TEMPLATE,))] = "plain"
    """plain, vicuna_v0, llama2, chatml, or `tokenizer` for the language model's own chat template."""
    system: str = ""
    """System text in front of every dialogue that has none; empty: the template's own opening."""
    max_answer_tokens: Annotated[int, Ge(1)] = 160
    """Longest answer in tokens, end mark included; a longer one is cut and keeps its end mark."""
    max_tokens: Annotated[int, Ge(1)] = 2048
    """Longest row in tokens, image positions included; a longer sample is skipped and counted."""
    isolate_turns: bool = False
    """Mask the turns of a dialogue from each other: every turn is trained as a first turn, and no answer can be read
    off another. In chat, a question is then answered without the turns before it; it sees all images."""


@settings
class DatasetsConfig:
    """Data sets, each under a name of your choice and with a `type`."""

    train: dict[str, Annotated[Component, OneOf(DATASETS)]] = field(default_factory=dict)
    """Training data, mixed by weight."""
    validation: dict[str, Annotated[Component, OneOf(DATASETS)]] = field(default_factory=dict)
    """Data for the validation loss, in a fixed order."""


@settings
class RunConfig:
    """What a runner does, for how long, and where its output is written."""

    runner: Annotated[str, NameIn(RUNNERS)] = "train"
    """Name of the runner class."""
    output_dir: str = ""
    """The run folder, required for training; a folder that already holds a run is only used with `resume`."""
    seed: Annotated[int, Ge(0)] = 42
    """Seed of data order, initial weights and sampling."""
    device: Device = "auto"
    """Where to compute; `auto` uses the accelerator if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; `auto` is bf16 on an accelerator that has it, fp32 elsewhere. fp16 requires an accelerator.
    With fp32 nothing is cast: each part computes in the precision of its weights (`dtype` of its section)."""
    resume: bool = False
    """Continue from the latest checkpoint in `output_dir` if there is one."""

    total_steps: Annotated[int, Ge(0)] = 0
    """Optimiser steps of the whole run, required for training."""
    global_batch_size: Annotated[int, Ge(1)] = 1
    """Samples per optimiser step over all ranks; the accumulation is derived from it."""
    batch_size_per_rank: Annotated[int, Ge(1)] = 1
    """Samples per forward pass on one rank."""
    group_by_length: Annotated[int, Ge(1)] = 1
    """Batches whose samples are sorted by length and divided among them, so that rows need less padding; each worker
    holds the decoded images of this many batches. If it is the number of accumulated batches, every step has the same
    samples as with 1, which keeps the order of the data."""
    pack: Annotated[int, Ge(0)] = 0
    """Length of a row that holds several samples, in tokens, image positions included; the samples do not see each
    other, and a longer one is skipped and counted. 0: a row for each sample. The loss is the same."""
    num_workers: Annotated[int, Ge(0)] = 0
    """Data loader processes per rank; 0 reads in the training process."""

    learning_rate: Annotated[float, Ge(0)] = 1e-4
    """Peak learning rate."""
    min_learning_rate: Annotated[float, Ge(0)] = 0.0
    """Learning rate at the last step."""
    warmup_start_learning_rate: Annotated[float, Ge(0)] = 1e-6
    """Learning rate at step 0."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps of linear warm-up."""
    steps_per_epoch: Annotated[int, Ge(0)] = 0
    """Only for `compat: published`, whose schedule restarts its warm-up with each epoch. 0: one epoch."""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """AdamW weight decay of matrices; vectors (biases, norms) have none."""
    adam_betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999)
    """AdamW moment decays."""
    adam_eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW epsilon."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    gradient_checkpointing: bool = False
    """Recompute the activations of the language model in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile the layers of the language model (`torch.compile`): each new width of a row takes 10 to 60 s once, so
    rows are padded to a few widths. For long runs. On a CPU it needs a C++ compiler; without one the run continues
    uncompiled. Not with gradient_checkpointing or shard_language_model."""
    measure_attention: bool = True
    """On a CPU, time sdpa and eager attention on the first batch and use the faster one for the image encoder and for a
    language model with `attn_implementation: auto`; a resumed run keeps the choice. false: sdpa, and two runs of one
    config are equal to the last bit."""
    shard_language_model: bool = False
    """Shard the frozen language model over the ranks (FSDP), for a model that fills a GPU: each rank holds a part of
    every layer and gathers the rest when it is needed, which takes time."""

    log_every_steps: Annotated[int, Ge(0)] = 10
    """Steps between two lines of metrics.jsonl; 0: the last step only."""
    save_every_steps: Annotated[int, Ge(0)] = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: Annotated[int, Ge(1)] = 3
    """Checkpoints kept; older ones are removed."""
    validate_every_steps: Annotated[int, Ge(0)] = 0
    """Steps between two validations on `datasets.validation`, if there is one; 0: at the end only."""
    validation_samples: Annotated[int, Ge(1)] = 256
    """Samples of the validation set that are used, the same ones each time."""

    max_skipped_fraction: Annotated[float, Ge(0), Le(1)] = 0.05
    """The run stops when more than this fraction of all samples was skipped (from 200 samples on)."""
    max_nonfinite_steps: Annotated[int, Ge(1)] = 5
    """Steps in a row with a loss or gradient that is not finite, each left out, before the run stops."""
    collective_timeout_seconds: Annotated[int, Ge(1)] = 1800
    """How long a rank waits for the others before it gives up."""


@settings
class TrackingConfig:
    """Trackers in addition to `metrics.jsonl`, which is always written."""

    wandb: bool = False
    """Report to Weights & Biases (needs a login, or WANDB_MODE=offline)."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run folder."""
    project: str = "minigpt4"
    """Project name shown by the trackers."""
    run_name: str = ""
    """Run name shown by the trackers; the name of the run folder when empty."""


@settings
class ChatConfig:
    """How answers are decoded; greedy by default, so that the same question gets the same answer."""

    max_new_tokens: Annotated[int, Ge(1)] = 300
    """Longest answer in tokens."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """Softmax temperature of sampling; 0 is greedy."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sampling keeps the most likely tokens up to this total probability."""
    top_k: Annotated[int, Ge(0)] = 0
    """Sampling keeps this many of the most likely tokens; 0 keeps all."""
    repetition_penalty: Annotated[float, Gt(0)] = 1.0
    """Divides the scores of tokens that are already in the answer; 1 is off."""
    num_beams: Annotated[int, Ge(1)] = 1
    """Beams of a search for the most likely answer as a whole, instead of token by token; 1 is off. Not with
    sampling."""
    length_penalty: float = 1.0
    """Beam search divides the log probability of an answer by its length to this power; above 0 favours long ones."""
    seed: int = 42
    """Seed of sampling."""

    def __post_init__(self) -> None:
        """Check what depends on several fields."""
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"num_beams {self.num_beams} requires temperature 0, found {self.temperature}: beams do not sample"
            )


@settings
class EvaluationConfig:
    """Visual question answering by exact match on easy-VQA's test split."""

    path: Annotated[str, FilePath()] = "asset:easy-vqa"
    """Folder of the easy-VQA data set."""
    samples: Annotated[int, Ge(0)] = 0
    """Questions asked, the same ones each time; 0 asks all."""
    batch_size: Annotated[int, Ge(1)] = 32
    """Questions answered together."""
    max_new_tokens: Annotated[int, Ge(1)] = 8
    """Longest answer in tokens."""
    shuffle_images: bool = False
    """Control: ask each question about an image of another colour and another shape, and keep the expected answer."""
    device: Device = "auto"
    """Where to compute; `auto` uses the accelerator if there is one."""
    output: str = ""
    """File for the result and every answer, as JSON lines; empty writes none."""
    seed: int = 42
    """Seed of the sample of questions and of the shuffle."""


@settings
class ServerConfig:
    """Limits of the service; a client that exceeds one gets an error that names it."""

    max_rows: Annotated[int, Ge(1)] = 16
    """Requests decoded together."""
    max_waiting: Annotated[int, Ge(0)] = 64
    """Requests that may wait in addition to those; the next one is refused with status 429."""
    max_body_megabytes: Annotated[float, Gt(0)] = 20.0
    """Largest request."""
    max_total_megabytes: Annotated[float, Gt(0)] = 400.0
    """Largest size of all requests together, from their first byte to the end of their answers. One too many replaces
    the one that has been incomplete for longest; if all are complete, it is refused with status 429."""
    max_connections: Annotated[int, Ge(1)] = 512
    """Open connections; one too many closes the one that has waited for longest without a complete request."""
    header_seconds: Annotated[float, Gt(0)] = 10.0
    """Longest time in which the header of a request must have arrived."""
    body_seconds: Annotated[float, Gt(0)] = 60.0
    """Longest time in which the body of a request must have arrived."""
    send_seconds: Annotated[float, Gt(0)] = 60.0
    """Longest time for which a client may read nothing of an answer that is being sent."""
    max_text_characters: Annotated[int, Ge(1)] = 200_000
    """Longest text of a request, all messages together; counted before anything is tokenised."""
    max_images: Annotated[int, Ge(0)] = 8
    """Images of a request, all messages together."""
    max_pixels: Annotated[int, Ge(1)] = 25_000_000
    """Largest image, in pixels."""
    images_at_once: Annotated[int, Ge(1)] = 2
    """Images decoded at once, all requests together; each takes up to about 200 MB for a moment."""
    max_new_tokens: Annotated[int, Ge(1)] = 2048
    """Longest answer that a request may ask for, in tokens."""
    image_urls: bool = False
    """Whether the service fetches images from http(s) addresses; never from private ones."""
    image_url_seconds: Annotated[float, Gt(0)] = 10.0
    """Longest time to fetch one image."""
    image_url_megabytes: Annotated[float, Gt(0)] = 10.0
    """Largest image that is fetched."""
    shutdown_seconds: Annotated[float, Ge(0)] = 30.0
    """How long answers in progress may continue after the service was asked to stop."""


@settings
class DemoExample:
    """An image and a question about it, offered to the visitor."""

    image: Annotated[str, FilePath()]
    """The image file; `shipped:` begins the path of a file that travels with the package."""
    question: str
    """The question about it."""


@settings
class DemoConfig:
    """What the page shows about a model."""

    about: str = ""
    """What the model can and cannot do: text with paragraphs, `**emphasis**` and lists, without links, images and HTML.
    Empty: the page says that there is no description."""
    examples: tuple[DemoExample, ...] = ()
    """Examples on the empty page."""
    visitors: Annotated[int, Ge(1)] = 4
    """Visitors answered at the same time; the others wait in a queue and see their place in it."""
    queue: Annotated[int, Ge(1)] = 64
    """Visitors that may wait; the next one is asked to come back later."""


@settings
class Config:
    """A whole, validated configuration; a section that the YAML does not have holds its defaults."""

    compat: Literal["ours", "published"] = "ours"
    """`published` reproduces the quirks of the published code: its schedule, the end mark cut by truncation, the chat
    prompt that differs from the training prompt."""
    plugins: tuple[str, ...] = ()
    """Python modules that are imported first; they register classes of your own."""
    model: ModelConfig
    processors: ProcessorsConfig = field(default_factory=ProcessorsConfig)
    conversation: ConversationConfig = field(default_factory=ConversationConfig)
    datasets: DatasetsConfig = field(default_factory=DatasetsConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)

    @cached_property
    def values(self) -> dict[str, Any]:
        """The complete values as plain Python, defaults included; `config_from_values` reads them."""
        values: dict[str, Any] = plain(self)
        return values

    def to_yaml(self) -> str:
        """Return the complete values as YAML: `config.yaml` of a run folder; `load_config` reads it."""
        return to_yaml(self.values)
