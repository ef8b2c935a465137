"""What a call costs at different shares of hits, beside the plain module, and from when on caching pays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from benchmarks.conftest import BATCH, Case, side_by_side
from modcache import MemoryStore, cache_of, cached_module

if TYPE_CHECKING:
    from benchmarks.conftest import Report

pytestmark = pytest.mark.usefixtures("one_thread")

SHARES = (0.0, 0.5, 0.9, 1.0)
INPUT = 64


def mlp(width: int) -> nn.Module:
    """Some milliseconds for a batch."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(INPUT, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
    )


@pytest.mark.parametrize("share", SHARES)
def test_share_of_hits(share: float, measured: bool, report: Report) -> None:
    """A batch of which this share is stored, and the forward time above which caching it pays."""
    case = Case(BATCH.rows, stored=BATCH.stored, rounds=80) if measured else BATCH.small()
    plain, encoder = mlp(case.width).requires_grad_(False).eval(), mlp(case.width)
    encoder = cached_module(encoder, store=MemoryStore(1 << 30), freeze=True)
    stored = torch.randn(case.stored, INPUT, generator=torch.Generator().manual_seed(1))
    for part in stored.split(case.rows):
        encoder(part)
    hits = round(case.rows * share)
    generator = torch.Generator().manual_seed(2)

    def batch(_: int) -> tuple[torch.Tensor]:
        known = stored[torch.randperm(case.stored, generator=generator)[:hits]]
        mixed = torch.cat([known, torch.randn(case.rows - hits, INPUT, generator=generator)])
        return (mixed[torch.randperm(case.rows, generator=generator)],)

    (first,) = batch(0)
    assert sum(cache_of(encoder).contains(first)) == hits
    torch.testing.assert_close(encoder(first), plain(first), rtol=1e-3, atol=1e-5)

    def missing(rows: torch.Tensor) -> torch.Tensor:
        return plain(rows[hits:])  # as many rows as have to be computed

    sides = side_by_side(case.rounds, batch, cached=encoder, plain=plain, missing=missing)
    report.sides(f"{share:.0%} hits, {case.rows} rows", sides)
    report.number(f"{share:.0%} hits, {case.rows} rows: cached ÷ plain", sides.ratio("cached", "plain"), "x")
    added = sides.median("cached") - (sides.median("missing") if hits < case.rows else 0.0)
    report.number(f"{share:.0%} hits, {case.rows} rows: added to what has to be computed", added * 1e6, "µs")
    if share:
        name = f"{share:.0%} hits, {case.rows} rows: break-even forward time of the batch"
        report.number(name, added / share * 1e6, "µs")


@pytest.mark.parametrize("rows", [8, 256])
def test_break_even(rows: int, measured: bool, report: Report) -> None:
    """The forward time above which an epoch of hits is quicker, and over how many epochs filling pays for itself."""
    case = Case(rows, rounds=60) if measured else Case(rows).small()
    encoder = cached_module(mlp(case.width), store=MemoryStore(1 << 30), freeze=True)
    generator = torch.Generator().manual_seed(3)
    plain = mlp(case.width).requires_grad_(False).eval()
    encoder(torch.randn(case.rows, INPUT, generator=generator))
    last = torch.empty(0)

    def fresh(_: int) -> tuple[torch.Tensor]:
        nonlocal last
        last = torch.randn(case.rows, INPUT, generator=generator)
        encoder(last)
        return last, torch.randn(case.rows, INPUT, generator=generator)

    sides = side_by_side(
        case.rounds,
        fresh,
        hit=lambda seen, _: encoder(seen),
        forward=lambda _, new: plain(new),
        fill=lambda _, new: encoder(new),
    )
    torch.testing.assert_close(encoder(last), plain(last), rtol=1e-3, atol=1e-5)
    report.sides(f"break-even, {case.rows} rows", sides)
    hit, filling = sides.median("hit"), max(sides.median("fill") - sides.median("forward"), 0.0)
    report.number(f"break-even forward time of {case.rows} rows, epochs of hits", hit * 1e6, "µs")
    # Two epochs: forward + filling + hit <= 2 * forward
    report.number(f"break-even forward time of {case.rows} rows, two epochs in all", (hit + filling) * 1e6, "µs")
