"""Make `fashion-1200-idx3-ubyte.gz` and `fashion-1200-idx1-ubyte.gz`: the first test images of Fashion-MNIST.

Run it with the folder of the four original files (on Debian: `/usr/share/datasets/fashion-mnist` of the package
`dataset-fashion-mnist`); it writes both files beside itself, in the original format. The same input gives the same
bytes.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

ROWS = 1_200
HERE = Path(__file__).parent


def shortened(original: bytes, rows: int) -> bytes:
    """An IDX file of bytes with its first rows only: a magic number, the sizes as big-endian int32, the values."""
    dims = original[3]
    sizes = [int.from_bytes(original[4 + 4 * dim : 8 + 4 * dim], "big") for dim in range(dims)]
    row = 1
    for size in sizes[1:]:
        row *= size
    begin = 4 + 4 * dims
    return original[:4] + rows.to_bytes(4, "big") + original[8:begin] + original[begin : begin + rows * row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, kind in (("images", "idx3"), ("labels", "idx1")):
        original = gzip.decompress((folder / f"t10k-{name}-{kind}-ubyte.gz").read_bytes())
        packed = gzip.compress(shortened(original, ROWS), 9, mtime=0)
        (HERE / f"fashion-{ROWS}-{kind}-ubyte.gz").write_bytes(packed)


if __name__ == "__main__":
    main()
