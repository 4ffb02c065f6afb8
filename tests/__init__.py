"""Tests; `REFERENCE` is the project's own copy of the published implementation's numbers."""

from pathlib import Path

REFERENCE = Path(__file__).parent / "data" / "reference"
