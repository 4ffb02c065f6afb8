"""The second language model of the runners' tests."""

from tests.runners.conftest import other_llm  # noqa: F401
