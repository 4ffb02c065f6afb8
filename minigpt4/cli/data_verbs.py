"""What `data` does: one function for each of its words, given its parsed arguments."""

from __future__ import annotations

import argparse
from pathlib import Path


def pack(arguments: argparse.Namespace) -> None:
    """`data pack`: write pairs of images and captions as shards, and print what is in them."""
    from minigpt4.preparation.pack import PackSettings
    from minigpt4.preparation.pack import pack as write
    from minigpt4.preparation.pairs import Keys

    settings = PackSettings(
        Keys(arguments.image_key, arguments.caption_key), arguments.samples_per_shard, not arguments.unchecked
    )
    image_dir = Path(arguments.image_dir) if arguments.image_dir else None
    out = Path(arguments.out)
    index = write(Path(arguments.source), out, settings, image_dir=image_dir, max_rejected=arguments.max_rejected)
    print(f"{out}: {index.samples:,} pairs in {len(index.shards)} shards")
    if index.rejected:
        causes = ", ".join(f"{cause}: {count}" for cause, count in index.rejected.items())
        print(f"left out: {sum(index.rejected.values()):,} rows ({causes}); see {out / 'rejected.jsonl'}")
