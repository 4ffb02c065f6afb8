"""The chat page in the browser: `python demo.py`, or `python demo.py --cfg-path FILE` for a model of your own."""

import sys

from minigpt4.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
