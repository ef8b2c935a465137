"""Judge a recycled model by the un-recycled one with a frozen trunk, over steps that miss, hit and mix."""

from __future__ import annotations

import collections
import dataclasses
import random
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from modcache import CacheWarning

Batch = tuple[Any, ...] | dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, where it is parted, and what may come of that.

    ``frozen`` and ``below`` name the parameters and the modules that feed the cut where autograd cannot tell, or that
    feed what ``extra`` stores; ``quiet_glue`` says that an ancestor
    of the cut drops out by itself what feeds the cut, which in a trunk is off; ``peek`` reads what a user would look
    at after a call; ``says`` is in the message of a refusal; ``act`` changes the model half-way; ``alone`` is false
    where the plain model cannot take a single row, and ``plays`` where it takes no hooks: there only a refusal counts.
    """

    name: str
    make: Callable[[], nn.Module]
    at: str
    batch: Callable[[Sequence[int]], Batch]
    expect: str = "works"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    frozen: frozenset[str] | None = None
    below: frozenset[str] = frozenset()
    quiet_glue: bool = False
    trains: bool = True
    size: int = 4
    tolerance: float = 1e-11
    peek: Callable[[nn.Module], Any] | None = None
    says: str = ""
    act: Callable[[nn.Module], None] | None = None
    alone: bool = True
    plays: bool = True

    def fresh(self) -> nn.Module:
        seeded(11)
        return self.make()

    def accepts(self, kind: str) -> bool:
        return kind == self.expect or (self.expect == "either" and kind in ("works", "refused"))


@dataclasses.dataclass(frozen=True)
class Step:
    """One call on rows, named by number; with ``train`` a backward and a step of the optimizer follow."""

    rows: tuple[int, ...]
    train: bool = False
    grad: bool = True


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor of an output as it was."""

    value: torch.Tensor
    kind: type
    grad: bool


@dataclasses.dataclass(frozen=True)
class Record:
    """What one step gave: output, inputs afterwards, gradients, state, and the rows that the counted block saw."""

    output: Any
    inputs: Any
    gradients: dict[str, torch.Tensor | None]
    state: dict[str, torch.Tensor]
    trainable: frozenset[str]
    seen: int
    error: type[BaseException] | None = None


@dataclasses.dataclass(frozen=True)
class Fed:
    """What feeds the cut: names of parameters and of modules."""

    parameters: frozenset[str]
    modules: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """``works``, ``refused``, ``wrong`` (silently) or ``crashed``, with the reason."""

    kind: str
    why: str = ""


class Runs:
    """Counts the rows of counted blocks, out of sight of a fingerprint."""

    __slots__ = ("rows",)


RUNS = Runs()
RUNS.rows = 0


class Block(nn.Linear):
    """A square linear layer that counts its rows."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        RUNS.rows += x.shape[0]
        return super().forward(x)


class Opaque:
    """An object that no tree of outputs knows; the harness looks into it as a user would."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def seeded(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


# --- trees ----------------------------------------------------------------------------------------------


def children(value: Any) -> list[tuple[str, Any]] | None:
    """The parts of a container by name; None for a leaf."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, tuple | list):
        return [(f"[{place}]", part) for place, part in enumerate(value)]
    if isinstance(value, Opaque) or (dataclasses.is_dataclass(value) and not isinstance(value, type | Leaf)):
        return [(f".{name}", part) for name, part in vars(value).items()]
    if hasattr(value, "to_tuple"):
        return children(value.to_tuple())
    return None


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    parts = children(value)
    if parts is None:
        yield path, value
        return
    yield path, type(value).__name__
    for name, part in parts:
        yield from leaves(part, path + name)


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def copied(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone()


def pictured(value: Any) -> list[tuple[str, Any]]:
    """The leaves as they are now; each tensor copied."""
    return [
        (path, Leaf(copied(leaf), type(leaf), leaf.requires_grad) if isinstance(leaf, torch.Tensor) else plain(leaf))
        for path, leaf in leaves(value)
    ]


def plain(value: Any) -> Any:
    """A value that compares by content, or the name of its class."""
    return value if isinstance(value, str | bytes | int | float | type(None)) else type(value).__name__


def call(model: nn.Module, batch: Batch) -> Any:
    found = model(**batch) if isinstance(batch, dict) else model(*batch)
    return list(found) if isinstance(found, types.GeneratorType) else found


def loss_of(found: Any) -> torch.Tensor | None:
    parts = [
        (leaf * torch.cos(torch.arange(leaf.numel(), dtype=leaf.dtype)).reshape(leaf.shape)).sum()
        for leaf in tensors(found)
        if leaf.requires_grad and leaf.is_floating_point()
    ]
    return torch.stack(parts).sum() if parts else None


# --- the oracle -----------------------------------------------------------------------------------------


def what_feeds(case: Case) -> Fed:
    """Ask autograd, on a fresh model, which parameters and which modules' outputs the cut's arguments come from.

    Inputs require grad, too, so that a dropout of an input is seen; there are models that cannot have that.
    """
    try:
        return _what_feeds(case, inputs_too=True)
    except AssertionError:
        return _what_feeds(case, inputs_too=False)


def _what_feeds(case: Case, *, inputs_too: bool) -> Fed:
    model = case.fresh()
    model.train(case.trains)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    batch = case.batch(range(case.size))
    for tensor in tensors(batch):
        if inputs_too and tensor.is_floating_point():
            tensor.requires_grad_()
    outputs: list[tuple[str, Any]] = []
    graph: set[Any] = set()
    inputs: list[Any] = []
    count = 0

    def output_of(name: str) -> Callable[..., None]:
        return lambda module, args, found: None if graph else outputs.append((name, found))

    def reach(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal count
        if count == case.options.get("call", 0):
            graph.update(ancestry([args, kwargs]))
            graph.add(None)
            inputs.extend(tensors([args, kwargs]))
        count += 1

    # The oldest pre-hook comes first: what a pre-hook of the user makes of the arguments is part of the cut.
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_hook(output_of(name))
    module_at(model, case.at).register_forward_pre_hook(reach, with_kwargs=True, prepend=True)
    with torch.enable_grad():
        try:
            call(model, batch)
        except Exception:
            # Above the cut all that is asked for is known.
            assert graph, f"the plain {case.name} raises before the cut"
    accumulated = {node.variable for node in graph if hasattr(node, "variable")}
    given = {id(tensor) for tensor in inputs}
    parameters = frozenset(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(parameter is one for one in accumulated) or id(parameter) in given
    )
    modules = frozenset(
        name
        for name, found in outputs
        if any((one.grad_fn is not None and one.grad_fn in graph) or id(one) in given for one in tensors(found))
    )
    return Fed(parameters if case.frozen is None else case.frozen, modules | case.below)


def ancestry(value: Any) -> set[Any]:
    """All nodes of the autograd graph below the tensors of a tree; leaves by their accumulators."""
    waiting = [
        one.grad_fn if one.grad_fn is not None else one.expand_as(one).grad_fn.next_functions[0][0]
        for one in tensors(value)
        if one.requires_grad
    ]
    found: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return found


def module_at(model: nn.Module, at: str) -> nn.Module:
    return model.get_submodule(at)


def ancestors(at: str) -> set[str]:
    names = at.split(".")
    return {".".join(names[:length]) for length in range(len(names))}


def freeze_trunk(model: nn.Module, case: Case, fed: Fed) -> None:
    """Make a plain model what recycling promises to equal: below the cut nothing learns, and all is in eval."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in fed.parameters:
            parameter.requires_grad_(False)
    below = fed.modules - ancestors(case.at) - {case.at}
    if case.quiet_glue:
        below |= ancestors(case.at)
    flags: dict[nn.Module, bool] = {}
    count = 0

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal count
        count = 0
        for name in sorted(below):
            below_cut = model.get_submodule(name)
            flags.setdefault(below_cut, below_cut.training)
            below_cut.training = False

    def leave(*_: Any) -> None:
        while flags:
            module, training = flags.popitem()
            module.training = training

    def reach(module: nn.Module, args: Any) -> None:
        nonlocal count
        if count == case.options.get("call", 0):
            leave()
        count += 1

    model.register_forward_pre_hook(enter, prepend=True)
    module_at(model, case.at).register_forward_pre_hook(reach, prepend=True)
    model.register_forward_hook(leave, always_call=True)


# --- playing --------------------------------------------------------------------------------------------


def steps_of(case: Case, train_first: bool) -> list[Step]:
    """Misses, hits, mixtures, repeated and permuted rows, other batch sizes, in both modes."""
    n = case.size
    first, second = tuple(range(n)), tuple(range(n, 2 * n))
    mixed = (1, *range(2 * n, 2 * n + n - 1), 1, 0)
    train = [Step(first, train=True), Step(first, train=True), Step(second, train=True), Step(mixed, train=True)]
    train.append(Step((*reversed(second), 0), train=True))
    other = [Step(first), Step(first[::-1], grad=False), Step(mixed, grad=False)]
    if case.alone:
        other += [Step((3 * n,)), Step((0,))]
    other.append(Step(tuple(range(3 * n + 3))))
    if not case.trains:
        return other
    return train + other + train[:2] if train_first else other + train + other[-1:]


def play(model: nn.Module, case: Case, steps: Sequence[Step]) -> Iterator[Record]:
    """Run the steps, and give what each did; outputs and inputs are ruined afterwards, as a user may."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.is_floating_point()], lr=0.01, momentum=0.9)
    for place, step in enumerate(steps):
        if case.act is not None and place == len(steps) // 2:
            case.act(model)
        yield stepped(model, case, step, optimizer)


def stepped(model: nn.Module, case: Case, step: Step, optimizer: torch.optim.Optimizer) -> Record:
    model.train(step.train)
    optimizer.zero_grad()
    batch = case.batch(step.rows)
    RUNS.rows = 0
    output: Any = None
    gradients: dict[str, torch.Tensor | None] = {}
    error = None
    try:
        with torch.set_grad_enabled(step.grad):
            found = call(model, batch)
        seen = RUNS.rows
        if case.peek is not None:
            found = (found, case.peek(model))
        output = pictured(found)
        loss = loss_of(found) if step.grad else None
        if loss is not None:
            loss.backward()
            gradients = {
                name: None if parameter.grad is None else copied(parameter.grad)
                for name, parameter in model.named_parameters()
            }
            if step.train:
                optimizer.step()
        inputs = pictured(batch)
        ruined([found, batch])
    except Exception as problem:
        if type(problem).__name__ == "CutError":
            raise
        error, seen, inputs = type(problem), RUNS.rows, None
    state = {name: copied(value) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return Record(output, inputs, gradients, state, trainable, seen, error)


def ruined(value: Any) -> None:
    """Overwrite tensors that the caller owns now: nothing of a later call may come from them."""
    for tensor in tensors(value):
        own = not isinstance(tensor, nn.Parameter) and not tensor.is_inference() and tensor.layout == torch.strided
        if own and not any(stride == 0 for stride in tensor.stride()):
            tensor.detach().copy_(torch.full_like(tensor, 7, requires_grad=False))


# --- comparing ------------------------------------------------------------------------------------------


def difference(found: Record, wanted: Record, tolerance: float) -> str:
    """In words, how a step differs from that of the oracle; empty when it does not."""
    if found.error is not wanted.error:
        return f"raised {found.error}, the plain model {wanted.error}"
    if wanted.error is not None:
        return ""
    for what in ("output", "inputs"):
        if told := trees_differ(getattr(found, what), getattr(wanted, what), tolerance):
            return f"{what} {told}"
    if not found.trainable <= wanted.trainable:
        return f"still trainable: {sorted(found.trainable - wanted.trainable)}"
    for what in ("gradients", "state"):
        ours, plain = getattr(found, what), getattr(wanted, what)
        if ours.keys() != plain.keys():
            return f"{what}: names {sorted(ours)} instead of {sorted(plain)}"
        for name, value in plain.items():
            if (ours[name] is None) != (value is None):
                return f"{what} of {name}: {ours[name]} instead of {value}"
            if value is not None and not near(ours[name], value, tolerance):
                return f"{what} of {name}: off by {gap(ours[name], value)}"
    return ""


def trees_differ(found: list[tuple[str, Any]], wanted: list[tuple[str, Any]], tolerance: float) -> str:
    if [path for path, _ in found] != [path for path, _ in wanted]:
        return f"has the leaves {[p for p, _ in found]} instead of {[p for p, _ in wanted]}"
    for (path, ours), (_, theirs) in zip(found, wanted, strict=True):
        if not isinstance(theirs, Leaf):
            if type(ours) is not type(theirs) or ours != theirs:
                return f"at {path or 'root'}: {ours!r} instead of {theirs!r}"
            continue
        if not isinstance(ours, Leaf):
            return f"at {path or 'root'}: {ours!r} instead of a tensor"
        facts = [(one.kind, one.grad, one.value.dtype, one.value.shape, one.value.device) for one in (ours, theirs)]
        if facts[0] != facts[1]:
            return f"at {path or 'root'}: {facts[0]} instead of {facts[1]}"
        if not near(ours.value, theirs.value, tolerance):
            return f"at {path or 'root'}: off by {gap(ours.value, theirs.value)}"
    return ""


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    if found.is_nested or wanted.is_nested:
        return len(found.unbind()) == len(wanted.unbind()) and all(map(torch.equal, found.unbind(), wanted.unbind()))
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not found.is_floating_point() and not found.is_complex():
        return torch.equal(found, wanted)
    scale = float(wanted.abs().nan_to_num(0, 0, 0).max()) if wanted.numel() else 0.0
    return torch.allclose(found, wanted, rtol=0, atol=tolerance * max(scale, 1.0), equal_nan=True)


def gap(found: torch.Tensor, wanted: torch.Tensor) -> str:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{found.dtype}{list(found.shape)} instead of {wanted.dtype}{list(wanted.shape)}"
    return f"{float((found.to(torch.complex128) - wanted.to(torch.complex128)).abs().nan_to_num(1e9).max()):.3g}"


# --- judging --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Under:
    """What is under test: its three verbs and its error."""

    recycle: Callable[..., nn.Module]
    uncached: Callable[[nn.Module], nn.Module]
    is_cached: Callable[[nn.Module], bool]
    error: type[Exception]
    counts: bool = True


def expected_records(case: Case, fed: Fed, steps: Sequence[Step]) -> list[Record]:
    """What the oracle gives: the plain model, its trunk frozen."""
    model = case.fresh()
    freeze_trunk(model, case, fed)
    seeded(5)
    return list(play(model, case, steps))


def judged(case: Case, under: Under, *, train_first: bool = True) -> Verdict:
    """Recycle a fresh model (with ``batch=`` unless training comes first) and compare it step by step.

    The oracle has played to its end before, so that nothing it leaves behind in a global can stand in for a value.
    """
    steps = steps_of(case, train_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = expected_records(case, what_feeds(case), steps) if case.plays else []
        model = case.fresh()
    for place, record in enumerate(expected):
        assert record.error is None, f"the plain {case.name} raises {record.error} at step {place}: {steps[place]}"
    options = dict(case.options)
    if not train_first:
        options["batch"] = case.batch(steps[0].rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for category in (CacheWarning, DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0", RuntimeWarning)  # by torch.compile
        return _judged(model, case, under, steps, expected, options)


def _judged(
    model: nn.Module, case: Case, under: Under, steps: list[Step], expected: list[Record], options: dict[str, Any]
) -> Verdict:
    kind = type(model)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    seeded(5)
    try:
        if (given := under.recycle(model, at=case.at, **options)) is not model:
            return Verdict("wrong", f"recycle gave {type(given)}, not the model")
        if told := _compared(model, case, under, steps, expected):
            return told
    except under.error as refusal:
        verdict = _fair(str(refusal), model, case)
    except Exception as problem:
        return Verdict("crashed", f"{type(problem).__name__}: {problem}")
    else:
        verdict = Verdict("works")
    try:
        if under.is_cached(model):
            under.uncached(model)
    except Exception as problem:
        return Verdict("crashed", f"uncached: {type(problem).__name__}: {problem}")
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters() if name in trainable}
    if verdict.kind in ("works", "refused") and case.act is None and (type(model) is not kind or after != trainable):
        return Verdict("wrong", f"not undone: {type(model)}, requires_grad {after} instead of {trainable}")
    return verdict


def _compared(model: nn.Module, case: Case, under: Under, steps: list[Step], expected: list[Record]) -> Verdict | None:
    known: collections.defaultdict[Any, set[int]] = collections.defaultdict(set)
    settled: collections.Counter[Any] = collections.Counter()
    if not case.plays:
        call(model, case.batch(steps[0].rows))
        return Verdict("wrong", "was not refused")
    for place, (found, wanted) in enumerate(zip(play(model, case, steps), expected, strict=True)):
        step = steps[place]
        where = f"step {place} ({'train' if step.train else 'eval'}, rows {list(step.rows)})"
        if told := difference(found, wanted, case.tolerance):
            return Verdict("crashed" if found.error else "wrong", f"{where}: {told}")
        batch = case.batch(step.rows)
        names = tuple(batch) if isinstance(batch, dict) else len(batch)
        form = (step.train, names)
        # Calls with other keywords may have rows of their own.
        most, least = len(set(step.rows) - known[names]), len(set(step.rows).difference(*known.values()))
        # The first calls of each form may probe, and a block that runs above the cut, too, tells nothing.
        counts = under.counts and case.act is None and wanted.seen == len(step.rows) and settled[form] >= 2
        if counts and not least <= found.seen <= most:
            return Verdict("wrong", f"{where}: the trunk saw {found.seen} rows, {most} were new")
        known[names].update(step.rows)
        settled[form] += 1
    return None


WAYS_OUT = re.compile(
    r"extra=True|call=|batch=|uncached|instead|\b(cut|recycle|move|remove|pass|use|give|set|call|switch|detach|freeze|"
    r"restore|keep|turn|take|run|wrap|name|register|compile|put|try|choose|make)\b",
    re.IGNORECASE,
)


def _fair(message: str, model: nn.Module, case: Case) -> Verdict:
    """A refusal names a module and a way out, and says what this case expects of it."""
    names = {name for name, _ in model.named_modules() if name} | {type(model).__name__, case.at}
    if not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in names):
        return Verdict("crashed", f"the refusal names no module: {message}")
    if not WAYS_OUT.search(message):
        return Verdict("crashed", f"the refusal names no way out: {message}")
    if not re.search(case.says, message):
        return Verdict("crashed", f"the refusal does not say {case.says!r}: {message}")
    return Verdict("refused", message)
