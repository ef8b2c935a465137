"""Models of many families, parted at many places, give the outputs and gradients of the un-recycled ones in float64."""

from __future__ import annotations

import collections
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from modcache import CutError, cache_of, is_cached, recycle, uncached
from tests import recycling_families
from tests.recycling_architectures import FAST, PAIRS, text
from tests.recycling_oracle import Under, Verdict, judged, seeded

NAMED = {case.name: case for case in PAIRS}
assert recycling_families.UNLABELLED, "importing them entered them"
UNDER = Under(recycle, uncached, is_cached, CutError)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()  # its thread outlives a test


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors are not worth a second thread, which costs seconds where other work runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def verdict_on(name: str, train_first: bool) -> Verdict:
    return judged(NAMED[name], UNDER, train_first=train_first)


def check(name: str, train_first: bool) -> None:
    verdict = verdict_on(name, train_first)
    assert NAMED[name].accepts(verdict.kind), f"{verdict.kind}, not {NAMED[name].expect}: {verdict.why}"


@pytest.mark.parametrize("name", sorted(FAST))
def test_fast_pair(name: str) -> None:
    """Outputs and gradients of misses, hits and mixtures equal the oracle's, or the cut is refused with a reason."""
    check(name, train_first=len(name) % 2 == 0)


@pytest.mark.parametrize("old", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing(old: bool) -> None:
    """Layers above the cut that transformers computes again on the way back learn as those that it does not."""
    case = NAMED["BERT at bert.encoder.layer.1"]
    gradients = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for checkpointed in (True, False):
            model = case.fresh()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": old})
            recycle(model, at=case.at, cut_requires_grad=checkpointed)
            seeded(1)
            model.train()
            for rows in ((0, 1, 2, 3), (2, 5, 6), (0, 1, 2, 3)):
                model(**case.batch(rows)).loss.backward()
            gradients.append({name: one.grad for name, one in model.named_parameters() if one.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert torch.allclose(gradients[0][name], gradient, atol=1e-12), name


def test_generate() -> None:
    """A recycled language model generates what the plain one does, or says why it cannot."""
    case = NAMED["GPT-2 at transformer.h.1"]
    model, plain = case.fresh().eval(), case.fresh().eval()
    ids = case.batch((0, 1, 2, 3))["input_ids"][:, :3]
    more = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = plain.generate(ids, use_cache=False, **more)
        recycle(model, at=case.at)
        model(input_ids=ids)
        assert torch.equal(model.generate(ids, use_cache=False, **more), wanted)
        with pytest.raises(CutError, match="cache"):
            model.generate(ids, use_cache=True, **more)
        uncached(model)
        assert torch.equal(model.generate(ids, use_cache=True, **more), wanted)


def test_token_keys() -> None:
    """With ``key="tokens"`` a text hits whatever length its batch was padded to, and the outputs are right."""
    case = NAMED["BERT at bert.encoder.layer.1"]
    model, plain = case.fresh().eval(), case.fresh().eval()
    batch = text(range(8), 6, labels=False)
    longer = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recycle(model, at=case.at, key="tokens")
        for given in (batch, longer, batch):
            found, wanted = model(**given).logits, plain(**given).logits
            assert torch.allclose(found, wanted, atol=1e-12)
        before = cache_of(model).stats.computed
        model(**{name: torch.nn.functional.pad(value, (0, 1)) for name, value in batch.items()})
        assert cache_of(model).stats.computed == before


def test_save_pretrained(tmp_path: Path) -> None:
    """A recycled model is saved and loaded as the plain one."""
    case = NAMED["BERT at bert.encoder.layer.1"]
    model = recycle(case.fresh(), at=case.at, batch=case.batch((0, 1, 2, 3)))
    model.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is transformers.BertForSequenceClassification
    for (name, ours), (_, theirs) in zip(again.state_dict().items(), case.fresh().state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.soak
@pytest.mark.parametrize("train_first", [True, False], ids=["training first", "batch given"])
@pytest.mark.parametrize("name", NAMED)
def test_pair(name: str, train_first: bool) -> None:
    """The same for every family and cut, whether the first call trains or a batch was given ahead."""
    check(name, train_first)


@pytest.mark.soak
def test_enough_pairs_work() -> None:
    """At least 65 pairs work, and none is silently wrong."""
    kinds = collections.Counter(verdict_on(name, True).kind for name in NAMED)
    assert kinds["works"] >= 65
    assert kinds["wrong"] == kinds["crashed"] == 0, kinds
