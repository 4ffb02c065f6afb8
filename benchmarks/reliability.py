"""Tried and right: `python benchmarks/reliability.py` runs the attacks of the tests, and writes their table.

Runs every test that states a figure, the long ones included, and replaces the table between the two marks in
`docs/reliability.md`. A row has the number of attempts, and how many of them were in tests that passed: a test ends at
its first wrong attempt, so a failed one counts with none.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->"
PREFIX = "figure: "


def main() -> int:
    """Run the tests, write the table, and return pytest's exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose table is replaced")
    page = parser.parse_args().page
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if f'"{PREFIX}' in _text(file)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "loadfile"]
        command += ["-m", "long or not long", f"--junitxml={report}", *files]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        rows = table(report.read_text(encoding="utf-8"))
    before, rest = _text(page).split(BEGIN)
    page.write_text(before + BEGIN + rows + END + rest.split(END)[1], encoding="utf-8")
    print(rows)
    return status


def table(report: str) -> str:
    """Return the Markdown table of a JUnit report."""
    tried: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for case in ET.fromstring(report).iter("testcase"):
        has_passed = case.find("failure") is None and case.find("error") is None
        for entry in case.iter("property"):
            name = entry.attrib["name"]
            if name.startswith(PREFIX):
                tried[name] += int(entry.attrib["value"])
                right[name] += int(entry.attrib["value"]) * has_passed
    lines = [f"| {name.removeprefix(PREFIX)} | {tried[name]:,} | {right[name]:,} |" for name in sorted(tried)]
    return "\n".join(["| what is tried | tried | right |", "|---|---:|---:|", *lines]) + "\n"


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
