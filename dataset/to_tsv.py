"""Turn a BLIP caption list (a JSON array of objects with `url` and `caption`) into the TSV that img2dataset reads.

The list is read item by item, so that memory does not grow with its size.
"""

import csv
import sys
from pathlib import Path

from tqdm import tqdm

from minigpt4.strict_json import JSONError, stream_list


def main() -> int:
    """Convert argv[1] to argv[2]; rows without both values are counted and left out."""
    if len(sys.argv) != 3:
        print("usage: python dataset/to_tsv.py LIST.json OUT.tsv", file=sys.stderr)
        return 2
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    kept = left_out = 0
    try:
        with source.open("rb") as file, target.open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, delimiter="\t")
            writer.writerow(("url", "caption"))
            with tqdm(total=source.stat().st_size, unit="B", unit_scale=True, disable=None) as bar:
                for item in stream_list(file, allow_nan=True):
                    bar.update(file.tell() - bar.n)
                    row = item.value if isinstance(item.value, dict) else {}
                    url, caption = row.get("url"), row.get("caption")
                    if isinstance(url, str) and isinstance(caption, str) and url.strip() and caption.strip():
                        writer.writerow((url, " ".join(caption.split())))
                        kept += 1
                    else:
                        left_out += 1
    except (OSError, JSONError, UnicodeError) as error:
        print(f"error: {source}: not a JSON list: {error}", file=sys.stderr)
        return 1
    print(f"{kept} pairs written to {target}, {left_out} left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
