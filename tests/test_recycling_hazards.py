"""A recycled model is never silently wrong: tiny adversarial models, and what users do to a model between calls."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from modcache import (
    CacheMissError,
    CacheWarning,
    CutError,
    MemoryStore,
    ModcacheError,
    cache_of,
    is_cached,
    mode,
    recycle,
    uncached,
)
from tests.recycling_cases import CASES
from tests.recycling_models import Parts, Plain, pairs, row, vectors
from tests.recycling_models_kinds import LowRank
from tests.recycling_oracle import (
    RUNS,
    Block,
    Case,
    Step,
    Under,
    call,
    difference,
    freeze_trunk,
    judged,
    seeded,
    stepped,
    what_feeds,
)

NAMED = {case.name: case for case in CASES}
UNDER = Under(recycle, uncached, is_cached, CutError)
ROWS = (0, 1, 2, 3)
MORE = (2, 5, 6, 2, 1)

COMPILES = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors are not worth a second thread, which costs seconds where other work runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("train_first", [True, False], ids=["training first", "batch given"])
@pytest.mark.parametrize("name", NAMED)
def test_hazard(name: str, train_first: bool) -> None:
    """Each model gives what it gives un-recycled, or is refused with a module and a way out; as the table says."""
    verdict = judged(NAMED[name], UNDER, train_first=train_first)
    assert NAMED[name].accepts(verdict.kind), f"{verdict.kind}, not {NAMED[name].expect}: {verdict.why}"


LOOPED = [
    case.name
    for case in CASES
    if case.expect == "works"
    and case.trains
    and case.plays
    and not case.name.startswith(("Compiled", "LaterKeywords"))
    # Torch's transformer takes another kernel where no gradient is wanted, as below the cut.
    and case.name != "TorchTransformer"
]


@pytest.mark.parametrize("name", LOOPED)
def test_twelve_steps_are_bitwise_equal(name: str) -> None:
    """Four epochs of three batches leave the same bits in every parameter, buffer and output, dropout included."""
    case = NAMED[name]
    epoch = [Step(tuple(range(start, start + case.size)), train=True) for start in (0, case.size, 2 * case.size)]
    with quiet():
        model, fed, plain = case.fresh(), what_feeds(case), case.fresh()
        seeded(5)
        found = trained(recycle(model, at=case.at, **case.options), case, epoch * 4)
        freeze_trunk(plain, case, fed)
        seeded(5)
        wanted = trained(plain, case, epoch * 4)
    for place, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert difference(ours, theirs, 0.0) == "", place


def trained(model: nn.Module, case: Case, steps: list[Step]) -> list[Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.is_floating_point()], lr=0.01)
    return [stepped(model, case, step, optimizer) for step in steps]


# --- what the tests below share -------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lets cache warnings, and torch's remarks about odd models, pass where a test is about something else."""
    with warnings.catch_warnings():
        for category in (CacheWarning, UserWarning, DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        yield


class Two:
    """A recycled model and its oracle, to which the same is done."""

    def __init__(self, name: str = "Plain", case: Case | None = None, **options: Any) -> None:
        self.case = NAMED[name] if case is None else case
        self.plain = self.case.fresh()
        freeze_trunk(self.plain, self.case, what_feeds(self.case))
        self.model = recycle(self.case.fresh(), at=self.case.at, **{**self.case.options, **options})

    def do(self, act: Callable[[nn.Module], object]) -> None:
        for model in (self.model, self.plain):
            act(model)

    def agree(self, rows: tuple[int, ...] = ROWS, *, train: bool = False, seen: int | None = None) -> None:
        """One call each, and a step of gradients; ``seen`` rows went through the trunk."""
        records = []
        for model in (self.model, self.plain):
            seeded(3)
            records.append(stepped(model, self.case, Step(rows, train), torch.optim.SGD(model.parameters(), lr=0.01)))
        found, wanted = records
        assert wanted.error is None
        assert difference(found, wanted, 1e-11) == ""
        if seen is not None:
            assert found.seen == seen


@pytest.fixture
def two() -> Two:
    with quiet():
        both = Two()
        both.agree()
        both.agree(train=True)
        both.agree(MORE)
        both.agree(MORE, train=True, seen=0)
    return both


# --- names and places -----------------------------------------------------------------------------------


def test_unknown_name() -> None:
    """A name that is not there is refused at once, with the nearest one, and nothing is changed."""
    model = Plain()
    with pytest.raises(CutError, match="high") as error:
        recycle(model, at="hihg")
    assert "hihg" in str(error.value)
    assert isinstance(error.value, ModcacheError)
    assert not is_cached(model)
    assert type(model) is Plain


@pytest.mark.parametrize(
    "options",
    [{"at": ""}, {"at": "mid", "call": -1}, {"at": "mid", "call": "x"}, {"at": 3}, {"at": "mid", "nothing": 1},
     {"at": "mid", "store": 3}],
    ids=str,
)  # fmt: skip
def test_wrong_options(options: dict[str, Any]) -> None:
    """An option that cannot be right raises at once and leaves the model as it was."""
    model = Plain()
    with pytest.raises((CutError, TypeError, ValueError)):
        recycle(model, **options)
    assert not is_cached(model)
    assert type(model) is Plain


def test_not_a_module() -> None:
    """Something else than a module is refused as such."""
    with pytest.raises((CutError, TypeError)):
        recycle(lambda x: x, at="mid")


def test_it_looks_as_before(two: Two) -> None:
    """Same object, class, names, modules, representation and state as the plain model."""
    model, plain = two.model, two.plain
    assert isinstance(model, Plain)
    assert (type(model).__name__, type(model).__module__) == ("Plain", Plain.__module__)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert repr(model) == repr(plain)
    assert [type(module) for module in list(model.modules())[1:]] == [
        type(module) for module in list(plain.modules())[1:]
    ]
    assert not [name for module in list(model.modules())[1:] for name in vars(module) if "modcache" in name]


def test_cut_tells_what_is_frozen() -> None:
    """The facts of the cut name what is frozen and what is tied, and print."""
    with quiet():
        two = Two("TiedHead")
        two.agree()
    cut = cache_of(two.model).cut
    frozen = {name for name, parameter in two.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"vectors.weight", "stem.weight", "stem.bias"}
    assert frozen <= set(cut.frozen)
    assert "head.weight" in str(cut)
    assert "ids" in str(cut)


def test_a_frozen_parameter_is_told_once() -> None:
    """What was trainable and is no longer is warned about by name, tied weights of the head above all."""
    case = NAMED["TiedHead"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = recycle(case.fresh(), at=case.at)
        for _ in range(3):
            call(model.train(), case.batch(ROWS))
            call(model.eval(), case.batch(ROWS))
    told = [str(one.message) for one in caught if issubclass(one.category, CacheWarning)]
    assert sum("head.weight" in one for one in told) == 1, told


def test_labels_are_not_in_the_key() -> None:
    """Other labels for the same rows compute nothing."""
    case = NAMED["Labels"]
    with quiet():
        two = Two("Labels")
        two.agree()
        two.agree(train=True)
        batch = case.batch(ROWS)
        two.model.eval()
        RUNS.rows = 0
        found = two.model(batch["x"], labels=1 - batch["labels"])
        assert RUNS.rows == 0
        torch.testing.assert_close(found.last_hidden_state, two.plain.eval()(batch["x"], 1 - batch["labels"])[0])


def test_positional_and_named_arguments_agree(two: Two) -> None:
    """A row is found again however its argument is handed in."""
    (x,) = vectors(ROWS)
    two.agree(seen=0)
    RUNS.rows = 0
    with quiet():
        found = two.model(x=x)
    assert RUNS.rows == 0
    torch.testing.assert_close(found, two.plain(x))


# --- changes of the trunk and of the head ---------------------------------------------------------------


def by_data(model: nn.Module) -> None:
    for parameter in model.stem.parameters():
        parameter.data.mul_(1.5)


def by_copy(model: nn.Module) -> None:
    with torch.no_grad():
        model.stem.weight.copy_(model.stem.weight * 2)


def by_numpy(model: nn.Module) -> None:
    model.low.weight.detach().numpy()[:] *= 3


def by_state(model: nn.Module) -> None:
    model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()})


def by_assignment(model: nn.Module) -> None:
    model.stem.weight = nn.Parameter(model.stem.weight.detach() * 2, requires_grad=False)


def by_layer(model: nn.Module) -> None:
    seeded(8)
    model.low = Block().double().requires_grad_(False)


def by_adapter(model: nn.Module) -> None:
    seeded(8)
    model.low = LowRank(model.low, dropout=0.0).double().requires_grad_(False)


def by_hook(model: nn.Module) -> None:
    model.stem.register_forward_hook(lambda module, args, found: found * 2)


def by_pre_hook(model: nn.Module) -> None:
    model.low.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def by_parametrization(model: nn.Module) -> None:
    parametrize.register_parametrization(model.stem, "weight", Negated())


def by_method(model: nn.Module) -> None:
    inner = model.low.forward
    model.low.forward = lambda x: inner(x) * 2


def by_attribute(model: nn.Module) -> None:
    model.drop.p = 0.9


class Negated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


BELOW = [by_data, by_copy, by_numpy, by_state, by_assignment, by_layer, by_adapter, by_hook, by_pre_hook,
         by_parametrization, by_method, by_attribute]  # fmt: skip


@pytest.mark.parametrize("act", BELOW, ids=lambda act: act.__name__)
def test_a_change_below_the_cut_is_seen(two: Two, act: Callable[[nn.Module], None]) -> None:
    """After a change of the trunk no old row is served; a change that cannot be parted is refused."""
    two.do(act)
    with quiet():
        try:
            for train in (False, True, False):
                two.agree(train=train)
                two.agree(MORE, train=train)
        except CutError:
            assert act in (by_adapter, by_layer, by_hook, by_pre_hook, by_parametrization, by_method)


def head_hook(model: nn.Module) -> None:
    model.high.register_forward_hook(lambda module, args, found: found * 2)


def cut_hook(model: nn.Module) -> None:
    model.mid.register_forward_hook(lambda module, args, found: found + 1)


def root_hook(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, args, found: found.sin())


def head_adapter(model: nn.Module) -> None:
    seeded(8)
    model.head = LowRank(nn.Linear(4, 4)).double()


def cut_adapter(model: nn.Module) -> None:
    seeded(8)
    model.mid[0] = LowRank(model.mid[0]).double()


def head_norm(model: nn.Module) -> None:
    parametrizations.weight_norm(model.head)


def head_data(model: nn.Module) -> None:
    model.head.weight.data.mul_(3)


def head_attribute(model: nn.Module) -> None:
    model.high[1].p = 0.9


@pytest.mark.parametrize(
    "act",
    [head_hook, cut_hook, root_hook, head_adapter, cut_adapter, head_norm, head_data, head_attribute],
    ids=lambda act: act.__name__,
)
def test_a_change_above_the_cut_costs_no_row(two: Two, act: Callable[[nn.Module], None]) -> None:
    """After a change of the head its new outputs are right, and no row is computed again."""
    two.do(act)
    with quiet():
        two.agree(seen=0)
        two.agree(MORE, train=True, seen=0)
        two.agree((9, 1), seen=1)


def test_a_pre_hook_at_the_cut(two: Two) -> None:
    """A pre-hook of the cut that comes later is heeded."""
    two.do(lambda model: model.mid.register_forward_pre_hook(lambda module, args: (args[0] * 2,)))
    with quiet():
        two.agree()
        two.agree(MORE, train=True)


def test_a_root_pre_hook(two: Two) -> None:
    """A pre-hook of the model changes the rows before they are keyed."""
    two.do(lambda model: model.register_forward_pre_hook(lambda module, args: (args[0] * 2,)))
    with quiet():
        two.agree()
        two.agree(MORE, train=True)


def test_an_attribute_of_the_model_that_feeds_the_trunk() -> None:
    """A plain attribute of an ancestor that changes what is computed below is seen."""

    class Scaled(Parts):
        scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.above(self.mid(self.below(x * self.scale)))

    with quiet():
        two = Two(case=Case("Scaled", lambda: Scaled().double(), "mid", vectors))
        two.agree()
        two.agree(train=True)
        for scale in (2.0, 1.0):
            two.do(lambda model, scale=scale: setattr(model, "scale", scale))
            two.agree()
            two.agree(MORE, train=True)


def test_a_hook_that_goes_again(two: Two) -> None:
    """Rows are right while a hook below is there, and after it was removed."""
    handles = []
    two.do(lambda model: handles.append(model.stem.register_forward_hook(lambda module, args, found: found * 2)))
    with quiet(), contextlib.suppress(CutError):
        two.agree()
    for handle in handles:
        handle.remove()
    with quiet():
        two.agree()
        two.agree(MORE, train=True)


def test_hooks_run_once_a_call(two: Two) -> None:
    """Hooks of the model, of the cut and of the head run once in every call that is not the first."""
    seen: list[str] = []
    for name in ("", "mid", "high", "head"):
        two.model.get_submodule(name).register_forward_hook(lambda module, args, found, name=name: seen.append(name))
    with quiet():
        for rows in (ROWS, MORE, (11, 12, 13)):
            seen.clear()
            call(two.model.train(), vectors(rows))
            assert sorted(seen) == ["", "head", "high", "mid"]


def test_root_hooks_run_once_in_the_first_call() -> None:
    """A hook of the model runs once also in the call that probes."""
    case, seen = NAMED["Plain"], []
    model = case.fresh()
    model.register_forward_hook(lambda *_: seen.append("hook"))
    model.register_forward_pre_hook(lambda *_: seen.append("pre"))
    recycle(model, at="mid")
    with quiet():
        call(model, vectors(ROWS))
    assert seen == ["pre", "hook"]


def test_a_trunk_that_is_made_trainable_again(two: Two) -> None:
    """Parameters of the trunk that the user unfreezes are never left without their gradient in silence."""
    two.model.requires_grad_(True)
    with quiet():
        try:
            two.model.train()
            two.model(*vectors(ROWS)).sum().backward()
        except CutError:
            return
    for name in ("stem.weight", "low.weight"):
        parameter = two.model.get_parameter(name)
        assert parameter.grad is not None or not parameter.requires_grad, name


def test_other_precision(two: Two) -> None:
    """A model that is cast to another dtype is right in it, and back."""
    (x,) = vectors(ROWS)
    with quiet():
        for dtype in (torch.float32, torch.float64):
            two.do(lambda model, dtype=dtype: model.to(dtype).eval())
            for _ in range(2):
                torch.testing.assert_close(two.model(x.to(dtype)), two.plain(x.to(dtype)), rtol=1e-5, atol=1e-6)


# --- ways of calling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Plain", "Residuals", "Attentive", "BatchNormAbove", "SharedTable"])
def test_first_batch_of_one_row(name: str) -> None:
    """A first batch of one row is refused with a reason, or is right; the next batch is right."""
    name = {"Attentive": "CoincidentalSizes", "SharedTable": "TableAsArgument"}.get(name, name)
    with quiet():
        two = Two(name)
        with contextlib.suppress(CutError):
            two.agree((3,))
        two.agree(ROWS)
        two.agree((7,))
        two.agree((3, 0, 7), train=True)


@pytest.mark.parametrize("name", ["Plain", "Residuals", "CoincidentalSizes", "BatchInFront"])
def test_batch_of_no_rows(name: str) -> None:
    """A batch of no rows gives what the plain model gives, or is refused."""
    case = NAMED[name]
    with quiet():
        two = Two(name)
        two.agree()
        batch = tuple(one[:0] for one in case.batch(ROWS))
        two.do(nn.Module.eval)
        with contextlib.suppress(CutError):
            torch.testing.assert_close(two.model(*batch), two.plain(*batch))
        two.agree(MORE)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("name", ["CoincidentalSizes", "TableAsArgument", "BatchInFront", "FlatTokens", "MaskByTokens"])
def test_first_batches_of_other_sizes(name: str, size: int) -> None:
    """What the first batch's size happens to equal decides nothing."""
    with quiet():
        two = Two(name)
        for rows in (tuple(range(size)), (9, 8, 7, 6), (1, 9, 30), (0, 1, 2, 3, 4, 5, 6, 7)):
            two.agree(rows)
            two.agree(rows, train=True)


def test_equal_rows_in_the_first_batch() -> None:
    """A first batch that repeats one row proves nothing about rows; what follows is right."""
    for name in ("Plain", "BatchMean", "BatchFirstRow", "TableAsArgument"):
        with quiet():
            two = Two(name)
            with contextlib.suppress(CutError):
                two.agree((3, 3, 3, 3))
                two.agree((3, 3))
                two.agree((1, 2, 3, 4))
                two.agree((4, 6, 3, 9), train=True)


def test_inference_mode_first() -> None:
    """Rows that were computed in inference mode serve a training step."""
    with quiet():
        two = Two()
        with torch.inference_mode():
            two.do(lambda model: model.eval()(*vectors(ROWS)))
            two.do(lambda model: model.eval()(*vectors(MORE)))
        two.agree(train=True)
        two.agree(MORE, train=True, seen=0)


def test_autocast_is_kept_apart() -> None:
    """Rows of a call under autocast do not serve one without, and are right themselves."""
    (x,) = vectors(ROWS)
    x = x.float()
    with quiet():
        two = Two(case=Case("Single", Plain, "mid", lambda rows: (vectors(rows)[0].float(),)))
        two.do(nn.Module.eval)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(two.model(x), two.plain(x), rtol=3e-2, atol=3e-2)
            torch.testing.assert_close(two.model(x), two.plain(x), rtol=1e-5, atol=1e-6)


def test_two_forwards_before_a_backward(two: Two) -> None:
    """Gradients of several calls add up, also where they share rows."""
    gradients = []
    with quiet():
        for model in (two.model, two.plain):
            seeded(4)
            model.train().zero_grad()
            first, second = (model(*vectors(rows)) for rows in (ROWS, MORE))
            (first.sum() * 2 + second.pow(2).sum()).backward()
            gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_gradients_of_gradients(two: Two) -> None:
    """The head can be differentiated twice."""
    found = []
    with quiet():
        for model in (two.model.eval(), two.plain.eval()):
            out = model(*vectors(ROWS)).pow(3).sum()
            (first,) = torch.autograd.grad(out, model.head.weight, create_graph=True)
            found.append(torch.autograd.grad(first.pow(2).sum(), model.high[0].weight)[0])
    torch.testing.assert_close(*found)


def test_what_was_given_can_be_written_into(two: Two) -> None:
    """Nobody else reads the memory of an output, and each call has its own."""
    (x,) = vectors(ROWS)
    two.do(nn.Module.eval)
    with quiet():
        first, second = two.model(x), two.model(x)
        kept = second.detach().clone()
        first.detach().zero_()
        assert torch.equal(second, kept)
        assert torch.equal(two.model(x), kept)


def test_forward_and_other_methods(two: Two) -> None:
    """``model.forward`` and other methods give what they give un-recycled."""
    (x,) = vectors(ROWS)
    two.do(nn.Module.eval)
    with quiet():
        for act in (lambda m: m.forward(x), lambda m: m.below(x), lambda m: m.first(x), lambda m: m.mid(x)):
            torch.testing.assert_close(act(two.model), act(two.plain))


def raising(*_: Any) -> None:
    raise KeyError(3)


def test_an_error_of_the_model_is_the_users(two: Two) -> None:
    """An error of the model comes out as it is, below and above the cut, and the next call is right."""
    with quiet():
        for wrong in (torch.randn(4, 5, dtype=torch.float64), "text"):
            kinds = []
            for model in (two.model, two.plain):
                with pytest.raises(Exception) as error:
                    model(wrong)
                kinds.append(error.type)
            assert kinds[0] is kinds[1] or issubclass(kinds[0], CutError)
        handles = []
        two.do(
            lambda m: handles.append(m.head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError(3))))
        )
        with pytest.raises(KeyError):
            two.model(*vectors((20, 21)))
        for handle in handles:
            handle.remove()
        two.agree()
        two.agree((20, 21, 0))


def test_an_interrupted_call_leaves_nothing_behind(two: Two) -> None:
    """A call that is interrupted below the cut changes nothing for the next one."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = two.model.low.register_forward_pre_hook(interrupt)
    with quiet():
        with pytest.raises((KeyboardInterrupt, CutError)):
            two.model(*vectors((20, 21)))
        handle.remove()
        two.agree()
        two.agree((20, 21, 0), train=True)


def test_threads(two: Two) -> None:
    """Threads that call one model at once each get their own rows."""
    two.do(nn.Module.eval)
    start = threading.Barrier(4)

    def work(seed: int) -> bool:
        start.wait()
        right = []
        for place in range(12):
            rows = tuple((seed * 7 + place * step) % 40 for step in range(1, 5))
            right.append(torch.allclose(two.model(*vectors(rows)), two.plain(*vectors(rows)), atol=1e-12))
        return all(right)

    with quiet(), ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [True] * 4


def test_first_calls_in_threads() -> None:
    """Threads that meet in the first call are all right."""
    with quiet():
        two = Two("Residuals")
        two.do(nn.Module.eval)
        start = threading.Barrier(4)

        def work(seed: int) -> bool:
            start.wait()
            x = vectors(tuple(range(seed, seed + 4)))
            return torch.allclose(two.model(*x), two.plain(*x), atol=1e-12)

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, range(4))) == [True] * 4


def test_modes(two: Two) -> None:
    """The modes mean for a cut what they mean for a module."""
    with quiet():
        with mode("require-hit"):
            two.agree(seen=0)
            with pytest.raises(CacheMissError):
                two.model.eval()(*vectors((30, 31)))
        with mode("off"):
            two.agree(train=True)
        with mode("read-only"):
            two.agree((32, 33))
            two.agree((32, 33), seen=2)
        with mode("refresh"):
            two.agree(seen=4)
        two.agree(seen=0)


def test_given_keys() -> None:
    """Rows may be named by the caller, who then answers for their names."""
    with quiet():
        two = Two()
        two.do(nn.Module.eval)
        (x,) = vectors(ROWS)
        two.model(x)
        for _ in range(2):
            torch.testing.assert_close(two.model(x, cache_keys=list(ROWS)), two.plain(x))
        RUNS.rows = 0
        two.model(torch.zeros_like(x), cache_keys=list(ROWS))
        assert RUNS.rows == 0


def test_one_store_for_many_models() -> None:
    """Models with other weights, and other cuts, never take each other's rows."""
    store = MemoryStore(1 << 20)
    with quiet():
        for _ in range(2):
            for name in ("Plain", "PlainLow", "PlainHead", "Residuals"):
                two = Two(name, store=store)
                seeded(17)
                if _:
                    two.do(by_data)
                two.agree()
                two.agree(train=True)
                two.agree(MORE, train=True)


def test_rows_in_a_directory(tmp_path: Path) -> None:
    """Another model with the same weights finds the rows that the first one stored, and they are right."""
    case = NAMED["Residuals"]
    with quiet():
        first = Two("Residuals", store=tmp_path)
        first.agree((10, 11, 12, 13))
        first.agree(ROWS)
        first.agree(ROWS, train=True)
        cache_of(first.model).flush()
        second = Two("Residuals", store=tmp_path)
        second.model.load_state_dict(first.model.state_dict())
        second.plain.load_state_dict(first.plain.state_dict())
        second.agree((20, 21, 22, 23))
        second.agree(ROWS, seen=0)
        second.agree((*ROWS, 7), train=True, seen=1)
        cache_of(first.model).close()
        cache_of(second.model).close()
        RUNS.rows = 0
        call(second.model.eval(), case.batch(ROWS))
        assert RUNS.rows == 4


def test_hits_are_verified() -> None:
    """With ``verify`` a share of the hits is computed again, and found equal."""
    with quiet():
        two = Two("Residuals", verify=1.0)
        for rows in (ROWS, MORE, ROWS):
            two.agree(rows)
            two.agree(rows, train=True)


# --- copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), copy.copy],
    ids=["deepcopy", "pickle", "copy"],
)
@pytest.mark.parametrize("called", [True, False])
def test_copies(again: Callable[[nn.Module], nn.Module], called: bool) -> None:
    """A copy is right, its head learns by itself, and the original stays right."""
    with quiet():
        two = Two()
        if called:
            two.agree(train=True)
            two.agree(MORE)
        plain = copy.deepcopy(two.plain)
        other = again(two.model)
        if again is not copy.copy:
            with torch.no_grad():
                for model in (other, plain):
                    model.head.weight.mul_(2)
        (x,) = vectors((0, 1, 9, 8))
        for _ in range(2):
            torch.testing.assert_close(other.eval()(x), plain.eval()(x))
        two.agree()
        two.agree((0, 1, 9, 8), train=True)


def test_a_copy_of_the_trunk_that_changes() -> None:
    """A deepcopy whose trunk is edited serves no row of the original, nor the reverse."""
    with quiet():
        two = Two()
        two.agree()
        other, plain = copy.deepcopy(two.model), copy.deepcopy(two.plain)
        for model in (other, plain):
            by_data(model.eval())
        (x,) = vectors(ROWS)
        torch.testing.assert_close(other(x), plain(x))
        two.agree(seen=0)
        torch.testing.assert_close(other(x), plain(x))


def test_state_of_another_model(two: Two) -> None:
    """A state dict goes in and out as with the plain model."""
    seeded(99)
    other = Plain().double()
    other.load_state_dict(two.model.state_dict())
    two.do(lambda model: model.load_state_dict({name: value * 1.1 for name, value in other.state_dict().items()}))
    with quiet():
        two.agree()
        two.agree(MORE, train=True)


def test_inside_of_another_model() -> None:
    """A recycled model is a part of a larger one, which trains and evaluates it."""

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.last = inner, nn.Linear(2, 2).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.inner(x))

    with quiet():
        two = Two()
        seeded(2)
        models = [Outer(two.model), Outer(two.plain)]
        models[1].last.load_state_dict(models[0].last.state_dict())
        for rows in (ROWS, MORE, ROWS):
            outs = []
            for model in models:
                seeded(6)
                outs.append(model.train()(*vectors(rows)))
                outs[-1].pow(2).sum().backward()
            torch.testing.assert_close(*outs)
        for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad)


def test_models_are_not_kept_alive() -> None:
    """A recycled model is collected when nobody holds it."""
    with quiet():
        two = Two()
        two.agree(train=True)
    gone = weakref.ref(two.model)
    del two
    gc.collect()
    assert gone() is None


# --- moving the cut -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "then"), [("low", "high"), ("high", "low"), ("mid", "head")])
def test_the_cut_moves(first: str, then: str) -> None:
    """Recycling again at another place replaces the cut: what is frozen, and what is served."""
    with quiet():
        case = Case("Moved", NAMED["Plain"].make, then, vectors)
        before = Case("Before", NAMED["Plain"].make, first, vectors)
        two = Two(case=before)
        two.agree()
        two.agree(train=True)
        state = copy.deepcopy(two.model.state_dict())
        assert recycle(two.model, at=then) is two.model
        two.case, two.plain = case, case.fresh()
        two.plain.load_state_dict(state)
        freeze_trunk(two.plain, case, what_feeds(case))
        for rows in (ROWS, MORE):
            two.agree(rows)
            two.agree(rows, train=True)
        trainable = {name for name, parameter in two.model.named_parameters() if parameter.requires_grad}
        assert trainable == {name for name, parameter in two.plain.named_parameters() if parameter.requires_grad}
        uncached(two.model)
        assert all(parameter.requires_grad for parameter in two.model.parameters())


def test_undone_and_done_again(two: Two) -> None:
    """A model that was parted, undone, and parted again is right each time."""
    with quiet():
        uncached(two.model)
        assert not is_cached(two.model)
        assert type(two.model) is Plain
        assert all(parameter.requires_grad for parameter in two.model.parameters())
        recycle(two.model, at="mid")
        two.agree()
        two.agree(MORE, train=True)


# --- torch's own machinery ------------------------------------------------------------------------------


@COMPILES
@pytest.mark.parametrize("which", ["head", "high", "mid"])
def test_a_compiled_head(two: Two, which: str) -> None:
    """A part of the head that is compiled later is right."""
    two.do(lambda model: model.get_submodule(which).compile(backend="eager"))
    with quiet():
        two.agree(seen=0)
        two.agree(MORE, train=True, seen=0)


@COMPILES
def test_a_compiled_parent() -> None:
    """A recycled model inside of a compiled one is right."""
    with quiet():
        two = Two()
        two.agree()
        outer = torch.compile(nn.Sequential(two.model, nn.Tanh()), backend="eager")
        (x,) = vectors(MORE)
        two.do(nn.Module.eval)
        for _ in range(3):
            torch.testing.assert_close(outer(x), two.plain(x).tanh())


class Reentrant(nn.Module):
    """A block that is computed again on the way back, in the old manner: it learns only if its input requires grad."""

    old = True

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.old)


class ReentrantHead(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.mid, self.high = Reentrant(), Reentrant()


def test_reentrant_checkpoints() -> None:
    """Old checkpoints in the head learn when what enters the cut requires grad."""
    case = Case("Reentrant", lambda: ReentrantHead().double(), "mid", vectors)
    found = []
    with quiet():
        plain = case.fresh()
        freeze_trunk(plain, case, what_feeds(case))
        plain.mid.old = plain.high.old = False
        for model in (recycle(case.fresh(), at="mid", cut_requires_grad=True), plain):
            seeded(5)
            model.train()
            for rows in (ROWS, MORE, ROWS):
                model(*vectors(rows)).pow(2).sum().backward()
            found.append({name: one.grad for name, one in model.named_parameters() if name.startswith(("mid", "h"))})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient)


def test_a_cut_that_requires_grad() -> None:
    """With ``cut_requires_grad`` the gradient of what enters the cut can be asked for."""
    case = NAMED["CutTensorInOutput"]
    with quiet():
        model = recycle(case.fresh(), at="mid", cut_requires_grad=True)
        for rows in (ROWS, MORE, ROWS):
            found = model.eval()(*vectors(rows))
            assert found["h"].requires_grad
            (gradient,) = torch.autograd.grad(found["out"].sum(), found["h"])
            assert gradient.shape == found["h"].shape
            assert gradient.abs().sum() > 0


def test_functional_call(two: Two) -> None:
    """Weights that are handed in for one call are heeded, or the call is refused."""
    state = {name: value * 2 for name, value in two.plain.state_dict().items()}
    two.do(nn.Module.eval)
    with quiet():
        wanted = torch.func.functional_call(two.plain, state, vectors(ROWS))
        try:
            found = torch.func.functional_call(two.model, state, vectors(ROWS))
        except CutError:
            found = wanted
        torch.testing.assert_close(found, wanted)
        two.agree()


def test_rows_of_floats_by_value(two: Two) -> None:
    """Rows that differ in the sign of a zero, or in the last bit, are different rows."""
    x = torch.zeros(4, 4, dtype=torch.float64)
    x[1] = -0.0
    x[2] = torch.nextafter(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    x[3] = 1e-300
    two.do(nn.Module.eval)
    RUNS.rows = 0
    with quiet():
        found = two.model(x)
    assert RUNS.rows == 4
    torch.testing.assert_close(found, two.plain(x))


def test_inputs_stay_untouched(two: Two) -> None:
    """The caller's tensors are not written, kept, or made to require grad."""
    (x,) = vectors((40, 41, 0, 1))
    kept = x.clone()
    with quiet():
        two.model.train()(x)
        x.zero_()
        assert not x.requires_grad
        torch.testing.assert_close(two.model.eval()(kept), two.plain.eval()(kept))


def test_each_input_of_two_is_in_the_key() -> None:
    """A row is known only when all its inputs are."""
    with quiet():
        two = Two("TwoTowersBelow")
        two.agree()
        two.agree(train=True)
        two.do(nn.Module.eval)
        x, y = pairs(ROWS)
        for other in (y.roll(1, 0), y * 2, y):
            torch.testing.assert_close(two.model(x, other), two.plain(x, other))
            torch.testing.assert_close(two.model(x=x, y=other), two.plain(x, other))


def test_many_rows_are_each_computed_once() -> None:
    """Over random batches with repeats, each distinct row goes through the trunk once."""
    with quiet():
        two = Two("Residuals")
        two.agree((100, 101, 102, 103))
        two.agree((100, 101, 102, 103), train=True)
        seeded(0)
        rows, seen = torch.randint(0, 60, (30, 8)).tolist(), 0
        for place, numbers in enumerate(rows):
            RUNS.rows = 0
            two.model.train(bool(place % 2))
            two.model(*vectors(numbers))
            seen += RUNS.rows
        assert seen == len({number for numbers in rows for number in numbers})


def test_rows_come_from_the_seeded_generator() -> None:
    """The rows of these tests are the same each time, and differ from each other."""
    assert torch.equal(row(3, 4), row(3, 4))
    assert not torch.equal(row(3, 4), row(4, 4))
