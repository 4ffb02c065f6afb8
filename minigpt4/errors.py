"""The exceptions of the package.

All have one parent, so that a caller (the command line, a notebook, a server) can distinguish errors that the user can
fix from defects: the command line prints the message of a `MiniGPT4Error` and exits with status 1, without a
traceback. A message names the place, what was found and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

from minigpt4.printable import printable


class MiniGPT4Error(Exception):
    """Parent of every error that a user can fix; `exit_status` is that of the command line."""

    exit_status = 1


class UnknownNameError(MiniGPT4Error):
    """A name is not in a registry."""


class ConfigError(MiniGPT4Error):
    """A configuration cannot be used; `problems` lists everything that is wrong, one line each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        head = "" if count == 1 else f"{count} problems in the configuration:\n"
        super().__init__(head + "\n".join(self.problems))


class MissingDependencyError(MiniGPT4Error):
    """An optional package is required and not installed."""

    def __init__(self, package: str, purpose: str, extra: str = "") -> None:
        target = f"'minigpt4[{extra}]'" if extra else package
        super().__init__(f"{purpose} needs the package {package!r}: pip install {target}")


class AssetError(MiniGPT4Error):
    """An asset cannot be downloaded, or does not have the expected content."""


class WeightsError(MiniGPT4Error):
    """Weights cannot be read, or do not fit the module."""


class CheckpointError(MiniGPT4Error):
    """A checkpoint is missing, damaged, or was trained with other parts."""


class ExportError(MiniGPT4Error):
    """A model does not fit the export format, or the export cannot be written."""


class DataError(MiniGPT4Error):
    """A data set or one of its samples cannot be used.

    `cause` is a short, fixed word by which skipped samples are counted (`"image"`, `"caption"`, ...). The message is
    one line, whatever the names in it hold.
    """

    def __init__(self, message: str, cause: str = "data") -> None:
        super().__init__(printable(message))
        self.cause = cause

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str]]:
        return type(self), (str(self), self.cause)


class ImageError(DataError):
    """An image cannot be read, or is larger than the limit."""

    def __init__(self, message: str, cause: str = "image") -> None:
        super().__init__(message, cause)


class ConversationError(DataError):
    """A dialogue cannot be rendered by a template, or has no tokens to train on."""

    def __init__(self, message: str, cause: str = "conversation") -> None:
        super().__init__(message, cause)


class FeatureCacheError(MiniGPT4Error):
    """Cached features are missing, damaged, or were made with other parts or images than those of the run."""


class ContextLengthError(MiniGPT4Error):
    """A prompt is longer than the language model's context."""


class DecodingError(MiniGPT4Error):
    """The logits of the language model cannot be used."""


class ServerError(MiniGPT4Error):
    """The service cannot start: the port is in use, or the key is not valid."""


class RequestError(MiniGPT4Error):
    """A client's request cannot be answered; the response says why.

    `status` is the HTTP status, `param` the part of the request that is wrong (`messages.0.content`), and `code` a
    short, fixed word that programs can compare.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class TrainingError(MiniGPT4Error):
    """Training cannot continue: values that are not finite, too many skipped samples, ranks that disagree."""


class RunStoppedError(MiniGPT4Error):
    """A signal stopped training; a checkpoint is saved. `exit_status` is 128 + the signal, as in shells."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal
