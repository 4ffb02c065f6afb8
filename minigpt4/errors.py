"""Every exception the package raises on purpose.

All have one parent, so a caller (the command line, a notebook, a server) can tell "the user can mend this" from
a defect: the command line prints the message of a `MiniGPT4Error` and exits with status 1, without a traceback.
A message names the place, what was found and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class MiniGPT4Error(Exception):
    """Parent of every error a user can mend."""


class UnknownNameError(MiniGPT4Error):
    """A registry was asked for a name it does not hold."""


class ConfigError(MiniGPT4Error):
    """A configuration cannot be used; `problems` lists everything found, one line each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        head = "" if count == 1 else f"{count} problems in the configuration:\n"
        super().__init__(head + "\n".join(self.problems))


class MissingDependencyError(MiniGPT4Error):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, purpose: str, extra: str = "") -> None:
        wanted = f"'minigpt4[{extra}]'" if extra else package
        super().__init__(f"{purpose} needs the package {package!r}: pip install {wanted}")


class AssetError(MiniGPT4Error):
    """A named asset could not be fetched, or does not have the expected content."""


class WeightsError(MiniGPT4Error):
    """Weights do not fit the module they are meant for."""


class CheckpointError(MiniGPT4Error):
    """A checkpoint is missing, damaged, or belongs to other parts."""


class ExportError(MiniGPT4Error):
    """A model does not fit the format it is to be exported to, or the export cannot be written."""


class DataError(MiniGPT4Error):
    """A data set or one of its samples cannot be used.

    `cause` is a short, stable word under which skipped samples are counted (`"image"`, `"caption"`, ...).
    """

    def __init__(self, message: str, cause: str = "data") -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str]]:
        return type(self), (str(self), self.cause)


class ImageError(DataError):
    """An image cannot be read, or is too large to be safe."""

    def __init__(self, message: str, cause: str = "image") -> None:
        super().__init__(message, cause)


class ConversationError(DataError):
    """A dialogue cannot be rendered by a template, or has nothing to learn from."""

    def __init__(self, message: str, cause: str = "conversation") -> None:
        super().__init__(message, cause)


class ContextLengthError(MiniGPT4Error):
    """A prompt is longer than the language model's context."""


class DecodingError(MiniGPT4Error):
    """The language model gives no usable logits."""


class ServerError(MiniGPT4Error):
    """The service cannot start: the port is taken, the key cannot be used."""


class RequestError(MiniGPT4Error):
    """A client's request is not answered; the client is told why.

    `status` is the HTTP status, `param` the part of the request that is wrong (`messages.0.content`), and `code` a
    short, stable word that programs can compare.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class TrainingError(MiniGPT4Error):
    """Training cannot go on: values that are not finite, too many skipped samples, ranks that disagree."""
