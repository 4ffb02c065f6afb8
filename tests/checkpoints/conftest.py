"""The second language model of the runners' tests, and files of the published layouts."""

from tests.checkpoints.published import files, written  # noqa: F401
from tests.runners.conftest import other_llm  # noqa: F401
