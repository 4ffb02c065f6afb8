"""Turn a BLIP caption list (a JSON array of objects with `url` and `caption`) into the TSV that img2dataset reads."""

import csv
import json
import sys
from pathlib import Path


def main() -> int:
    """Convert argv[1] to argv[2]; rows without both values are counted and left out."""
    if len(sys.argv) != 3:
        print("usage: python dataset/to_tsv.py LIST.json OUT.tsv", file=sys.stderr)
        return 2
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        rows = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"error: {source}: not a JSON list: {error}", file=sys.stderr)
        return 1
    kept = [(r["url"], " ".join(r["caption"].split())) for r in rows if r.get("url") and r.get("caption")]
    with target.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, delimiter="\t")
        writer.writerow(("url", "caption"))
        writer.writerows(kept)
    print(f"{len(kept)} pairs written to {target}, {len(rows) - len(kept)} left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
