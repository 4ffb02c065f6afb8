"""The settings of every evaluation task, one class each; `minigpt4.registry.TASKS` says which task each belongs to."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge

from minigpt4.config.schema import FilePath, NameIn, settings
from minigpt4.registry import SCORERS


@settings
class TaskConfig:
    """The settings that every task has."""

    prompt: str = "{question}"
    """What the model is asked; `{question}` is the question of the data."""
    max_new_tokens: Annotated[int, Ge(0)] = 0
    """Longest answer in tokens; 0 is `evaluation.max_new_tokens`."""
    samples: Annotated[int, Ge(0)] = 0
    """Questions asked, the same ones each time; 0 is `evaluation.samples`."""


@settings
class EasyVqaTaskConfig(TaskConfig):
    """Questions of easy-VQA's test split, scored by exact match; by likelihood or as captions on request."""

    path: Annotated[str, FilePath()] = "asset:easy-vqa"
    """Folder of the easy-VQA data set."""
    form: Literal["questions", "choices", "captions"] = "questions"
    """`questions`: the answers, by exact match. `choices`: questions about colour and shape, all colours or shapes
    ranked by likelihood. `captions`: one description per image, with four descriptions as references."""


@settings
class RowsTaskConfig(TaskConfig):
    """Your own questions, one JSON object per line: `image`, `question`, and what the scorer compares with."""

    path: Annotated[str, FilePath()]
    """The `.jsonl` file, or `.tsv` as VLMEvalKit writes it (columns `index`, `image` as base64, `question`, `answer`,
    choices in columns `A`, `B`, ...)."""
    image_dir: Annotated[str, FilePath()] = ""
    """The folder that image paths are relative to; empty: the folder of the file."""
    scorer: Annotated[str, NameIn(SCORERS)] = "exact"
    """How answers are scored. `exact`, `yes_no` and `choices` read `answer`; `vqa` and `vizwiz` read `answers`, the
    answers of several people; `captions` reads `captions`; `choices` also reads `choices`; `failures` reads nothing."""


@settings
class CaptionsTaskConfig(TaskConfig):
    """One caption per image: BLEU-1..4, ROUGE-L, CIDEr-D, lengths."""

    prompt: str = "Please describe the image shortly and precisely, in less than 20 words."
    """What the model is asked (default: the short prompt of the paper's Table 6)."""
    max_new_tokens: Annotated[int, Ge(0)] = 60
    """Longest caption in tokens; 0 is `evaluation.max_new_tokens`."""
    annotations: Annotated[str, FilePath()]
    """The captions: `captions_val2014.json` (COCO), `nocaps_val_4500_captions.json`, `results_20130124.token`
    (Flickr30k), or `dataset_coco.json`, `dataset_flickr30k.json` (Karpathy's splits)."""
    image_dir: Annotated[str, FilePath()]
    """Folder of the images."""
    layout: Literal["coco", "nocaps", "flickr", "karpathy"] = "coco"
    """Layout of the annotations."""
    split: str = "test"
    """The split of the layout `karpathy`; the others have one split per file."""


@settings
class VqaTaskConfig(TaskConfig):
    """Visual question answering with the rule of each data set."""

    layout: Literal["vqav2", "vizwiz", "gqa", "aokvqa"] = "vqav2"
    """`vqav2` (OK-VQA too): the official accuracy over ten answers. `vizwiz`: min(matches / 3, 1). `gqa`: exact match.
    `aokvqa`: direct answers, without those marked difficult."""
    questions: Annotated[str, FilePath()]
    """The questions: `v2_OpenEnded_mscoco_val2014_questions.json`, `OpenEnded_mscoco_val2014_questions.json`,
    `val.json` (VizWiz), `testdev_balanced_questions.json`, `aokvqa_v1p0_val.json`."""
    annotations: Annotated[str, FilePath()] = ""
    """The answers, where they are a file of their own (`vqav2`)."""
    image_dir: Annotated[str, FilePath()]
    """Folder of the images."""
    image_name: str = ""
    """File name for an image number, such as `COCO_val2014_{:012d}.jpg`; empty: the name of the layout's val split."""
    prompt: str = "Based on the image, respond to this question with a short answer: {question}"
    """What the model is asked (default: the published evaluation code, for its second version)."""
    max_new_tokens: Annotated[int, Ge(0)] = 20
    """Longest answer in tokens; 0 is `evaluation.max_new_tokens`."""


@settings
class PopeTaskConfig(TaskConfig):
    """POPE: is an object in the image? Accuracy, precision, recall, F1 and the share of yes, for each split."""

    files: Annotated[list[str], FilePath()]
    """One file per split: `coco_pope_random.json`, `coco_pope_popular.json`, `coco_pope_adversarial.json`."""
    image_dir: Annotated[str, FilePath()]
    """Folder of the images."""
    max_new_tokens: Annotated[int, Ge(0)] = 20
    """Longest answer in tokens; 0 is `evaluation.max_new_tokens`."""


@settings
class ChoicesTaskConfig(TaskConfig):
    """Multiple choice: every choice is scored by its likelihood, both length-normalised and by the published rule."""

    layout: Literal["aokvqa", "scienceqa", "iconqa"] = "aokvqa"
    """`aokvqa`: `aokvqa_v1p0_val.json`. `scienceqa`: `problems.json`; questions without an image are left out.
    `iconqa`: `choose_text_val.json`, as the published evaluation code reads it."""
    questions: Annotated[str, FilePath()]
    """The file of questions."""
    image_dir: Annotated[str, FilePath()]
    """Folder of the images."""
    image_name: str = "{:012d}.jpg"
    """File name for an image number (`aokvqa`)."""
    split: str = "test"
    """The split of `scienceqa`; the others have one split per file."""
