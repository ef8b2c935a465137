"""The judge of recycled models says `works` of a right recycler, and finds out each wrong one."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.recycling_cases import CASES
from tests.recycling_oracle import Case, Under, Verdict, freeze_trunk, judged, module_at, tensors, what_feeds

NAMED = {case.name: case for case in CASES}
SKIPS = ["UNet", "WhereSkip", "MaskSkip", "NestedOutput", "HiddenStatesOn", "InPlaceSkip"]
RUNNING = [
    case.name
    for case in CASES
    if case.expect == "works" and case.options.get("call", 0) == 0 and not case.name.startswith(("NoGrad", "Compiled"))
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors are not worth a second thread, which costs seconds where other work runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class WrongError(Exception):
    """Stands for an error that nothing raises."""


def judge(name: str, recycle: Callable[..., nn.Module], **more: Any) -> Verdict:
    case = NAMED[name]
    undo: dict[nn.Module, Callable[[], None]] = {}

    def recycled(model: nn.Module, **options: Any) -> nn.Module:
        wanted = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
        recycle(model, case)
        undo[model] = lambda: [model.get_parameter(key).requires_grad_(value) for key, value in wanted.items()]
        return model

    def uncached(model: nn.Module) -> nn.Module:
        undo.pop(model)()
        return model

    under = Under(recycled, uncached, undo.__contains__, WrongError, counts=False)
    return judged(case, under, **more)


def right(model: nn.Module, case: Case) -> None:
    """Run everything, with the trunk frozen."""
    freeze_trunk(model, case, what_feeds_quietly(case))


def what_feeds_quietly(case: Case) -> Any:
    with torch.random.fork_rng(devices=[]):
        return what_feeds(case)


def unfrozen(model: nn.Module, case: Case) -> None:
    """Freeze nothing."""


def frozen_in_training(model: nn.Module, case: Case) -> None:
    """Freeze, and leave the trunk in training."""
    for name in what_feeds_quietly(case).parameters:
        model.get_parameter(name).requires_grad_(False)


def frozen_too_much(model: nn.Module, case: Case) -> None:
    """Freeze one parameter of the head, too."""
    right(model, case)
    list(model.parameters())[-1].requires_grad_(False)


def drawing(model: nn.Module, case: Case) -> None:
    """Draw a random number on the way."""
    right(model, case)
    torch.rand(())


def naive(model: nn.Module, case: Case) -> None:
    """Give rows of zeros for what was computed below, and put stored rows in at the cut."""
    right(model, case)
    fed = what_feeds_quietly(case).modules
    stored: dict[bytes, Any] = {}
    state = collections.deque([(None, False)], maxlen=1)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        rows = [one.numpy().tobytes() for one in tensors([args, kwargs])[0].detach()]
        state.append((rows, all(one in stored for one in rows)))

    def below(module: nn.Module, args: Any, found: Any) -> Any:
        return torch.zeros_like(found) if state[0][1] and isinstance(found, torch.Tensor) else None

    def cut(module: nn.Module, args: Any) -> Any:
        rows, hit = state[0]
        if hit:
            return (torch.stack([stored[one] for one in rows]), *args[1:])
        stored.update(zip(rows, args[0].detach().clone(), strict=True))
        return None

    model.register_forward_pre_hook(enter, with_kwargs=True)
    for name in fed:
        if name and not case.at.startswith(name):
            module_at(model, name).register_forward_hook(below)
    module_at(model, case.at).register_forward_pre_hook(cut)


@pytest.mark.parametrize("name", RUNNING)
def test_a_right_recycler_works(name: str) -> None:
    """A model that is only frozen below, and in eval there, equals the oracle at every step."""
    assert judge(name, right, train_first=len(name) % 2 == 0) == Verdict("works")


@pytest.mark.parametrize("name", ["Plain", "Residuals", "TiedHead", "DirectParameters", "BatchNormBelow", "Adapted"])
def test_an_unfrozen_trunk_is_found(name: str) -> None:
    """A trunk that still learns is wrong."""
    assert judge(name, unfrozen).kind == "wrong"


@pytest.mark.parametrize("name", ["Plain", "BatchNormBelow", "ReadsTraining", "SharedActivation", "Adapted"])
def test_a_trunk_in_training_is_found(name: str) -> None:
    """A trunk that drops out or counts statistics is wrong."""
    assert judge(name, frozen_in_training).kind == "wrong"


@pytest.mark.parametrize("name", ["Plain", "Residuals", "BatchNormAbove"])
def test_a_frozen_head_is_found(name: str) -> None:
    """A head that does not learn is wrong."""
    assert judge(name, frozen_too_much).kind == "wrong"


@pytest.mark.parametrize("name", ["Plain", "BatchNormAbove", "NoiseForTheHead"])
def test_a_drawn_number_is_found(name: str) -> None:
    """Another dropout in the head is wrong."""
    if name == "BatchNormAbove":
        assert "Dropout" in repr(NAMED[name].fresh().high)
    assert judge(name, drawing).kind == "wrong"


@pytest.mark.parametrize("name", SKIPS)
def test_a_naive_recycler_is_found(name: str) -> None:
    """Zeros in place of what goes around the cut are found out."""
    verdict = judge(name, naive)
    assert verdict.kind == "wrong", verdict


@pytest.mark.parametrize("name", ["Plain", "PlainLow", "Convolutions", "PlainHead"])
def test_a_naive_recycler_passes_where_nothing_is_hard(name: str) -> None:
    """A chain is right even so: what is found out above is found for its own sake."""
    assert judge(name, naive) == Verdict("works")


def test_crashes_and_refusals_are_told_apart() -> None:
    """An error of the machinery is a crash; a refusal has to name a module and a way out."""

    def raising(error: Exception) -> Callable[..., None]:
        def recycle(model: nn.Module, case: Case) -> None:
            raise error

        return recycle

    assert judge("Plain", raising(RuntimeError("at mid"))).kind == "crashed"
    assert judge("Plain", raising(WrongError("something is wrong"))).kind == "crashed"
    assert judge("Plain", raising(WrongError("'mid' was not reached"))).kind == "crashed"
    assert judge("Plain", raising(WrongError("'mid' was not reached: cut later"))).kind == "refused"
