"""llama.cpp, where it is installed and can be loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def llama_cpp() -> None:
    """Skip where the wheel of llama.cpp is missing, or was built for a later C library than this machine's."""
    pytest.importorskip("llama_cpp_py_sync")
    load = "from llama_cpp_py_sync._cffi_bindings import get_mtmd_lib; get_mtmd_lib()"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"llama.cpp cannot be loaded here: {done.stderr.strip().splitlines()[-1][-200:]}")
