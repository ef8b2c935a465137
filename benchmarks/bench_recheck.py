"""What does it cost, on every call, to be sure that a module is still what it was?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from torch import nn

from benchmarks.conftest import side_by_side
from modcache.fingerprint import Identity

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.conftest import Report

pytestmark = pytest.mark.usefixtures("one_thread")


def bert(layers: int, width: int) -> nn.Module:
    """A BERT of random weights: what is looked at does not depend on them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, vocab_size=1000
    )
    return transformers.BertModel(config)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[bool], nn.Module]] = {
    "one Linear": lambda measured: nn.Linear(768, 768),
    "MiniLM of 6 layers": lambda measured: bert(6, 384) if measured else bert(1, 48),
    "BERT of 12 layers": lambda measured: bert(12, 768) if measured else bert(2, 48),
}


@pytest.mark.parametrize("name", MODELS)
def test_recheck(name: str, measured: bool, report: Report) -> None:
    """A still module gives the very same answer; a write behind autograd's back gives another state."""
    module = MODELS[name](measured).eval().requires_grad_(False)
    identity = Identity()
    first = identity.check(module, True)
    sides = side_by_side(
        1000 if measured else 2,
        None,
        grad=lambda: identity.check(module, True),
        no_grad=lambda: identity.check(module, False),
    )
    report.sides(f"re-check of a {name}", sides)
    if name == "BERT of 12 layers":
        report.goal(f"re-check of a {name}, grad mode on, µs", sides.median("grad") * 1e6, at_most=120)
    for grad in (True, False):
        assert identity.check(module, grad) is first
    next(iter(module.parameters())).data.add_(1)
    assert identity.check(module, True).state != first.state
