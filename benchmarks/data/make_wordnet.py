"""Make `wordnet-nouns.tsv.gz`: 6,000 noun definitions drawn from WordNet 3.0, each with its class.

Run it with the path of WordNet's `data.noun` (on Debian: `/usr/share/wordnet/data.noun` of the package
`wordnet-base`); it writes the table beside itself.  The same input gives the same rows in the same order.

A line of the table is `class <TAB> offset <TAB> definition`: one of WordNet's 26 lexicographer classes of
nouns, the byte offset that names the synset in `data.noun`, and the definition without the usage examples
that follow it there.  The draw is uniform and the lines lie in random order, so that the first n of them
are a fair sample too.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROWS = 6_000
TABLE = Path(__file__).with_name("wordnet-nouns.tsv.gz")

# The lexicographer files 03 to 28, in WordNet's numbering (lexnames(5WN)); "tops" is noun.Tops.
CLASSES = (
    "tops act animal artifact attribute body cognition communication event feeling food group location "
    "motive object person phenomenon plant possession process quantity relation shape state substance time"
).split()


class Row(NamedTuple):
    """One definition, with the class and the offset of its synset."""

    name: str
    offset: str
    definition: str


def parse(lines: Iterable[str]) -> list[Row]:
    """Return one row per distinct definition, the first synset winning."""
    rows: dict[str, Row] = {}
    for line in lines:
        if line.startswith("  "):  # the licence at the head of the file
            continue
        fields, _, gloss = line.partition(" | ")
        offset, number = fields.split(" ", 2)[:2]
        definition = gloss.split('; "')[0].strip()  # usage examples follow in quotation marks
        if definition:
            # A definition met twice would be both trained on and tested on.
            rows.setdefault(definition, Row(CLASSES[int(number) - 3], offset, definition))
    return list(rows.values())


def draw(rows: Iterable[Row], n: int) -> list[Row]:
    """Return n rows in the order of a digest: random, and the same under every version of Python."""
    return sorted(rows, key=lambda row: hashlib.sha256(row.offset.encode()).digest())[:n]


def main(argv: Sequence[str] | None = None) -> None:
    """Read `data.noun`, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data_noun", type=Path, help="path of WordNet's data.noun")
    options = parser.parse_args(argv)

    rows = draw(parse(options.data_noun.read_text(encoding="utf-8").splitlines()), ROWS)
    text = "".join("\t".join(row) + "\n" for row in rows)
    # No time and no file name in the header: the same rows give the same bytes.
    TABLE.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(f"{len(rows)} rows of {len({row.name for row in rows})} classes in {TABLE.name}")


if __name__ == "__main__":
    main()
