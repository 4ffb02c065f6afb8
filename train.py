"""Train: `python train.py --cfg-path FILE [--options run.seed=1 ...]`; the same under torchrun."""

import sys

from minigpt4.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
