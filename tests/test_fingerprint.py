"""The fingerprint: what moves the state of a module, what does not, and what comes back."""

import collections
import copy
import datetime as dt
import enum
import fractions
import functools
import math
import os
import pickle
import queue
import re
import subprocess
import sys
import textwrap
import threading
import time
import types
import typing
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from modcache.fingerprint import UNDETERMINED, Identity, callable_digest, code, context, context_facts
from modcache.fingerprint.probe import DeviceProbe

SCALE = 2.0


def helper(x):
    return x * SCALE


class Config:
    def __init__(self):
        self.width = 4
        self.names = ["a", "b"]


class Block(nn.Module):
    """Something of everything that can change."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.one = nn.Parameter(torch.ones(1))
        self.register_buffer("table", torch.arange(8.0))
        self.register_buffer("hidden", torch.arange(3.0), persistent=False)
        self.config = Config()
        self.flag = 1
        self.zero = 0.0
        self.items = [1, 2]
        self.options = {"a": 1}
        self.array = np.arange(5.0)
        self.plain = torch.ones(6)
        self.inside = [nn.Linear(4, 4)]

    def forward(self, x):
        return helper(self.norm(self.linear(x))) * self.one


def frozen(module):
    return module.eval().requires_grad_(False)


def block(seed=0):
    torch.manual_seed(seed)
    module = frozen(Block())
    module.inside[0].requires_grad_(False)
    return module


class Followed:
    """A module with its identity, as the call layer uses it."""

    def __init__(self, module, **options):
        self.module, self.identity = module, Identity(**options)
        module.__dict__["_modcache"] = self.identity

    def check(self, grad=True):
        return self.identity.check(self.module, grad)

    def state(self, grad=False):
        return self.check(grad).state

    def states(self, count=17):
        return {self.state() for _ in range(count)}


def swap(get, put, value):
    """An edit and its undoing, for something that can be read and written."""

    def edit(module):
        old = get(module)
        put(module, value(old) if callable(value) else value)
        return lambda: put(module, old)

    return edit


def attribute(path, value):
    *parents, name = path.split(".")

    def owner(module):
        for parent in parents:
            module = getattr(module, parent)
        return module

    return swap(lambda m: getattr(owner(m), name), lambda m, v: setattr(owner(m), name, v), value)


def in_place(path, write):
    def edit(module):
        target = module
        for name in path.split("."):
            target = getattr(target, name)
        old = copy.deepcopy(target)
        write(target)
        if isinstance(target, np.ndarray):
            return lambda: np.copyto(target, old)
        return lambda: target.data.copy_(old)

    return edit


def optimizer_step(module):
    weight = module.linear.weight.requires_grad_(True)
    old = weight.detach().clone()
    (module(torch.ones(2, 4)) * torch.arange(4.0)).sum().backward()
    torch.optim.SGD([weight], lr=0.5).step()
    weight.requires_grad_(False)

    def undo():
        with torch.no_grad():
            weight.copy_(old)

    return undo


def load_state_dict(assign):
    def edit(module):
        old = copy.deepcopy(module.state_dict())
        new = {name: tensor + 1 for name, tensor in old.items()}
        module.load_state_dict(new, assign=assign)
        module.requires_grad_(False)
        return lambda: module.load_state_dict(old, assign=assign) and module.requires_grad_(False)

    return edit


def numpy_write(module):
    view = module.linear.weight.numpy()
    old = view.copy()
    view += 1
    return lambda: np.copyto(view, old)


def data_set(module):
    old = module.linear.weight.data
    module.linear.weight.data = old + 1
    return lambda: setattr(module.linear.weight, "data", old)


def half_float(module):
    old = module.linear.weight.data
    module.half().float()
    module.identity_dropped = None
    del module.identity_dropped
    return lambda: setattr(module.linear.weight, "data", old)


def replaced(path):
    return attribute(path, lambda old: nn.Parameter(old + 1, requires_grad=False))


def child_added(module):
    module.extra = frozen(nn.Linear(2, 2))
    return lambda: delattr(module, "extra")


def class_swapped(module):
    class Norm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    module.norm.__class__ = Norm
    return lambda: setattr(module.norm, "__class__", nn.LayerNorm)


class Double(nn.Module):
    def forward(self, x):
        return x * 2


def parametrized(module):
    parametrize.register_parametrization(module.linear, "weight", frozen(Double()))
    return lambda: parametrize.remove_parametrizations(module.linear, "weight", leave_parametrized=False)


def forward_hook(kind, where):
    def edit(module):
        target = module.get_submodule(where)
        return getattr(target, f"register_forward_{kind}")(lambda *args: None).remove

    return edit


def global_hook(_):
    return nn.modules.module.register_module_forward_hook(lambda *args: None).remove


def class_forward(module):
    old = nn.LayerNorm.forward
    nn.LayerNorm.forward = lambda self, x: x
    return lambda: setattr(nn.LayerNorm, "forward", old)


def own_class_forward(module):
    old = Block.forward
    Block.forward = lambda self, x: x
    return lambda: setattr(Block, "forward", old)


def instance_forward(module):
    module.linear.forward = lambda x: x
    return lambda: delattr(module.linear, "forward")


def constant(module):
    global SCALE  # the point of the test
    SCALE = 3.0

    def undo():
        global SCALE
        SCALE = 2.0

    return undo


def global_function(module):
    global helper
    old, helper = helper, lambda x: x

    def undo():
        global helper
        helper = old

    return undo


def new_code(module):
    old = helper.__code__
    helper.__code__ = (lambda x: x - SCALE).__code__
    return lambda: setattr(helper, "__code__", old)


def swapped_tensors(module):
    other = nn.Parameter(module.linear.weight + 1, requires_grad=False)
    torch.utils.swap_tensors(module.linear.weight, other)
    return lambda: torch.utils.swap_tensors(module.linear.weight, other)


EDITS = {
    "optimizer step": optimizer_step,
    "load_state_dict": load_state_dict(False),
    "load_state_dict assign": load_state_dict(True),
    ".data.add_": in_place("linear.weight", lambda t: t.data.add_(1)),
    ".data =": data_set,
    "numpy write": numpy_write,
    "half().float()": half_float,
    "replaced parameter": replaced("linear.weight"),
    "replaced parameter of one element": replaced("one"),
    "one element in place": in_place("one", lambda t: t.add_(1)),
    "replaced child": attribute("linear", lambda old: frozen(nn.Linear(4, 4))),
    "deleted child": attribute("norm", None),
    "added child": child_added,
    "child's class": class_swapped,
    "parametrization": parametrized,
    "weight_norm": lambda m: (
        nn.utils.parametrizations.weight_norm(m.linear).requires_grad_(False)
        and (lambda: parametrize.remove_parametrizations(m.linear, "weight", leave_parametrized=True))
    ),
    "hook": forward_hook("hook", "linear"),
    "pre-hook": forward_hook("pre_hook", "linear"),
    "global hook": global_hook,
    "eps": attribute("norm.eps", 0.5),
    "config field": attribute("config.width", 5),
    "config list": lambda m: m.config.names.append("c") or m.config.names.pop,
    "list": lambda m: m.items.append(3) or m.items.pop,
    "dict": lambda m: m.options.update(b=2) or (lambda: m.options.pop("b")),
    "bool for int": attribute("flag", True),
    "float for int": attribute("flag", 1.0),
    "negative zero": attribute("zero", -0.0),
    "new attribute": lambda m: setattr(m, "more", 1) or (lambda: delattr(m, "more")),
    "buffer in place": in_place("table", lambda t: t.add_(1)),
    "non-persistent buffer": in_place("hidden", lambda t: t.data.add_(1)),
    "array": in_place("array", lambda a: np.add(a, 1, out=a)),
    "plain tensor": in_place("plain", lambda t: t.mul_(2)),
    "module in a list": lambda m: m.inside[0].weight.data.add_(1) is None or (lambda: m.inside[0].weight.data.sub_(1)),
    "forward of a class of torch": class_forward,
    "forward of the class": own_class_forward,
    "forward of an instance": instance_forward,
    "global constant": constant,
    "global function": global_function,
    "code of a function": new_code,
    "swap_tensors": swapped_tensors,
}
INEXACT = {"module in a list", "weight_norm", "half().float()"}  # undoing rounds


@pytest.mark.parametrize("eager_bytes", [1 << 20, 0], ids=["digested", "counted"])
@pytest.mark.parametrize("name", EDITS)
def test_edit_changes_the_state(name, eager_bytes):
    """Each edit gives another state within one round of checks; undone, digested states are known again."""
    followed = Followed(block(), eager_bytes=eager_bytes)
    before = followed.state()
    assert followed.states() == {before}
    undo = EDITS[name](followed.module)
    followed.states()
    after = followed.state()
    assert after != before
    assert after != UNDETERMINED
    undo()
    followed.states()
    if eager_bytes and name not in INEXACT:
        assert followed.state() == before
    assert not followed.check().restless


NOT_LATE = sorted(set(EDITS) - {"code of a function"})


@pytest.mark.parametrize("name", NOT_LATE)
def test_edit_is_seen_at_the_next_check(name):
    """No edit of the table but new code in an old function waits for its turn."""
    followed = Followed(block())
    followed.check()
    before = followed.state()
    undo = EDITS[name](followed.module)
    try:
        assert followed.state() != before
    finally:
        undo()


@pytest.mark.parametrize("name", EDITS)
def test_edit_changes_the_digest(name):
    """Two fresh looks, before and after an edit, give different digests."""
    module = block()
    before = Followed(module).identity.fingerprint(module)
    undo = EDITS[name](module)
    try:
        after = Followed(module).identity.fingerprint(module)
    finally:
        undo()
    assert before.digest != after.digest
    assert before.parts != after.parts


HARMLESS = {
    "to cpu": lambda m: m.to("cpu"),
    "zero_grad": lambda m: m.zero_grad(),
    "state_dict": lambda m: m.state_dict(),
    "repr": repr,
    "deepcopy": copy.deepcopy,
    "hook on the root": forward_hook("hook", ""),
    "pre-hook on the root": forward_hook("pre_hook", ""),
    "backward hook": lambda m: m.linear.register_full_backward_hook(lambda *args: None),
    "state dict hook": lambda m: m._register_state_dict_hook(lambda *args: None),
    "forward": lambda m: m(torch.ones(2, 4)),
    "origin": lambda m: setattr(m.config, "_name_or_path", "elsewhere"),
    "equal parameter": lambda m: setattr(m.linear, "weight", nn.Parameter(m.linear.weight.clone(), False)),
    "equal one": lambda m: setattr(m, "one", nn.Parameter(m.one.clone(), False)),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_things_change_nothing(name):
    """What does not change a result gives the same state and the same digest."""
    followed = Followed(block())
    before, digest = followed.state(), followed.identity.fingerprint(followed.module).digest
    HARMLESS[name](followed.module)
    assert followed.states() == {before}
    assert followed.identity.fingerprint(followed.module).digest == digest


# --- standing ---


def test_nothing_moved_gives_the_same_object():
    """A still module is answered with the very same standing, with and without grad mode."""
    followed = Followed(block())
    first = followed.check()
    assert all(followed.check(grad) is first for grad in (True, False) * 20)


def test_what_requires_grad_is_named_in_grad_mode_only():
    """The first tensor that needs grad is named while grad mode is on; then no state is worked out."""
    followed = Followed(block())
    before = followed.check()
    followed.module.norm.weight.requires_grad_(True)
    assert followed.check(True).trainable == "norm.weight"
    assert followed.check(True).state == UNDETERMINED
    assert followed.check(False).trainable is None
    assert followed.check(False).state == before.state
    followed.module.norm.weight.requires_grad_(False)
    assert followed.check(True) == before


def test_training_names_only_what_may_be_random():
    """Layers known to ignore the mode do not count, dropout and the user's own classes do."""

    class Own(nn.Module):
        def forward(self, x):
            return x

    def risky(module):
        return Followed(module.train().requires_grad_(False)).check().training

    assert risky(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2), nn.Dropout(0.0), nn.LSTM(2, 2))) is None
    assert risky(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))) == "1"
    assert risky(nn.Sequential(nn.Sequential(Own()))) == "0.0"
    assert risky(Own()) == "Own"
    assert risky(nn.BatchNorm1d(2)) == "BatchNorm1d"
    assert risky(nn.LSTM(2, 2, 2, dropout=0.5)) == "LSTM"
    assert risky(nn.Embedding(3, 2)) is None
    assert risky(nn.Embedding(3, 2, max_norm=1.0)) == "Embedding"
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *args: None)
    assert risky(hooked) == "Linear"
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x
    assert risky(patched) == "Linear"


@pytest.mark.parametrize("library", ["torchvision.transforms.v2._geometry", "torchaudio.transforms._transforms"])
def test_transforms_ask_for_no_mode(library):
    """They are modules that nobody puts in eval mode; what the user derives from one may be anything."""
    transform = type("Resize", (nn.Module,), {"__module__": library, "forward": lambda self, x: x})
    own = type("Own", (transform,), {"__module__": __name__})
    for cls, name in ((transform, None), (own, "0")):
        module = nn.Sequential(cls()).train()
        assert Followed(module).check().training == name


def test_mode_comes_and_goes():
    """train() and eval() are seen at once, and the state afterwards is the one before."""
    followed = Followed(frozen(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))))
    before = followed.check()
    followed.module.train()
    assert followed.check().training == "1"
    assert followed.check().state == UNDETERMINED
    followed.module[1].eval()
    assert followed.check().training is None
    assert followed.check().state == before.state
    followed.module.eval()
    assert followed.check() == before


UNREADABLE = {
    "meta": lambda m: m.to("meta"),
    "freed": lambda m: m.weight.untyped_storage().resize_(0),
    "sparse": lambda m: m.register_buffer("s", torch.eye(3).to_sparse()),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_weights_are_named_and_never_read(name):
    """Weights without values are named; with a version the module has a state all the same."""
    for version in (None, "1"):
        followed = Followed(frozen(nn.Linear(3, 3)), version=version)
        followed.check()
        UNREADABLE[name](followed.module)
        standing = followed.check()
        assert standing.unreadable
        assert (standing.state == UNDETERMINED) == (version is None)
        assert followed.check() is standing
        followed.identity.fingerprint(followed.module)


def test_storage_that_comes_back_is_read_again():
    """A storage that is freed and filled again with the same values gives the same state again."""
    followed = Followed(frozen(nn.Linear(3, 3)))
    before = followed.check()
    weight = followed.module.weight
    old = weight.detach().clone()
    weight.untyped_storage().resize_(0)
    assert followed.check().unreadable == ("weight",)
    weight.untyped_storage().resize_(36)
    weight.data.copy_(old)
    assert followed.check() == before


def test_lazy_modules_are_told():
    """Uninitialised parameters are said so, until a forward makes them."""
    followed = Followed(nn.Sequential(nn.LazyLinear(2)).eval())
    assert followed.check().lazy
    followed.module(torch.ones(1, 3))
    followed.module.requires_grad_(False)
    assert not followed.check().lazy
    assert followed.check().state == 0


def test_functional_call_is_not_mistaken_for_the_module():
    """Parameters put in place for one call are another state, and the old one comes back after it."""
    followed = Followed(frozen(nn.Linear(3, 3)))
    before = followed.check()
    seen = queue.SimpleQueue()  # without content, unlike a list that the hook would close over
    followed.module.register_forward_pre_hook(lambda m, args: seen.put(m.__dict__["_modcache"].check(m, True)))
    hooked = followed.check()
    other = {"weight": torch.zeros(3, 3)}
    torch.func.functional_call(followed.module, other, (torch.ones(1, 3),))
    assert seen.get().state not in {before.state, hooked.state}
    torch.func.vmap(lambda w: torch.func.functional_call(followed.module, {"weight": w}, (torch.ones(1, 3),)))(
        torch.ones(2, 3, 3)
    )
    assert seen.get().unreadable
    assert followed.check() == hooked


# --- noticing late ---


def test_a_dense_write_without_a_trace_is_not_late():
    """A numpy write to all of a weight is seen at the next check, and known to have come after the last."""
    followed = Followed(frozen(nn.Linear(300, 300)))
    view = followed.module.weight.numpy()
    before = followed.states().pop()
    view += 1
    assert followed.state() != before
    assert followed.identity.late_moves == 0


def test_a_write_that_waited_for_its_window_says_so():
    """A write to a few rows is seen when its window comes round; since when rows are suspect is told."""
    followed = Followed(frozen(nn.Linear(300, 304)))
    followed.states(40)
    while followed.identity.turn % 8 != 2:
        followed.check()
    before = followed.state()
    followed.module.weight.numpy()[38:76] += 1  # the second eighth: its turn is six checks away
    seen = [followed.state() for _ in range(8)]
    assert seen[0] == before != seen[-1]
    assert followed.identity.late_moves == 1
    assert 0 < followed.identity.spoiled_since < followed.identity.turn - 8


def test_a_sparse_write_waits_for_recheck():
    """One element behind autograd's back may stay unseen; a full look finds it."""
    followed = Followed(frozen(nn.Linear(400, 400)))
    followed.check()
    before = followed.state()
    assert not followed.identity.recheck(followed.module)
    followed.module.weight.numpy()[123, 45] += 1
    followed.states()
    unseen = followed.state() == before
    assert followed.identity.recheck(followed.module) == unseen
    assert followed.state() != before
    assert not followed.identity.recheck(followed.module)


def test_undigested_weights_cannot_be_vouched_for():
    """A recheck of weights that were never digested counts them as changed, once."""
    followed = Followed(frozen(nn.Linear(4, 4)), eager_bytes=0)
    before = followed.state()
    assert followed.identity.recheck(followed.module)
    assert followed.state() != before
    assert not followed.identity.recheck(followed.module)


def test_write_of_the_same_values_makes_restless_and_rest_heals():
    """Weights written with what they are: bypassed from the third time, until two looks find peace."""
    followed = Followed(block())
    before = followed.state()
    weight = followed.module.linear.weight
    standings = []
    for _ in range(5):
        weight.data = weight.data.clone()
        standings.append(followed.check())
    assert [standing.restless for standing in standings] == [False, False, True, True, True]
    assert followed.check().restless
    assert not followed.check().restless
    assert followed.state() == before


def test_moving_at_every_call_is_not_digested_for_ever():
    """Weights that change before each call are bypassed after a while, and known again at rest."""
    followed = Followed(block())
    weight = followed.module.linear.weight
    standings = []
    for _ in range(12):
        with torch.no_grad():
            weight.add_(1)
        standings.append(followed.check())
    assert len({standing.state for standing in standings[:7]}) == 7
    assert standings[-1].restless
    assert standings[-1].state == UNDETERMINED
    followed.check()
    assert not followed.check().restless
    assert followed.state() not in {standing.state for standing in standings}


def test_small_buffers_may_be_sent_again_each_step():
    """DDP writes buffers with equal values before each forward: neither another state nor restless."""
    followed = Followed(block())
    before = followed.check()
    for _ in range(10):
        with torch.no_grad():
            followed.module.table.copy_(followed.module.table.clone())
        assert followed.check() == before


# --- settling ---


class Chatty(nn.Module):
    """A forward that leaves all kinds of traces."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.count, self.last, self.log, self.scale = 0, None, [], 1.0
        self.config = Config()
        self.config.seen = 0

    def forward(self, x):
        self.count += 1
        self.calls += 1
        self.last = self.linear(x) * self.scale
        self.log.append(self.count)
        self.config.seen += 1
        self.fresh = self.count
        return self.last


def test_what_a_forward_changes_is_bookkeeping():
    """Counters, logs and kept outputs count by their first value; other edits are seen."""
    followed = Followed(frozen(Chatty()))
    first = followed.identity.fingerprint(followed.module)
    before = followed.state()
    for _ in range(3):
        with torch.no_grad():
            followed.module(torch.ones(1, 2))
        assert followed.identity.settle(followed.module) is None
        assert followed.states() == {before}
    found = followed.identity.fingerprint(followed.module)
    assert found.digest == first.digest
    assert set(found.bookkeeping) == {"calls", "config.seen", "count", "fresh", "last", "log"}
    followed.module.config.width = 9
    assert followed.state() != before
    followed.module.config.width = 4
    assert followed.state() == before
    followed.module.scale = 2.0
    assert followed.state() != before


class Shared(nn.Module):
    """Two attributes are one list, which a forward changes or replaces."""

    def __init__(self, replaced):
        super().__init__()
        self.g = self.h = []
        self.replaced = replaced

    def forward(self, x):
        self.h.append(1)
        if self.replaced:
            self.g, self.h = [1], [2]
        return x


@pytest.mark.parametrize("replaced", [True])
def test_bookkeeping_of_one_object_at_two_places_keeps_its_first_value(replaced):
    """Attributes that share one object have the fingerprint of before after a forward changed it."""
    followed = Followed(frozen(Shared(replaced)))
    first = followed.identity.fingerprint(followed.module)
    followed.module(torch.ones(1))
    assert followed.identity.settle(followed.module) is None
    assert followed.identity.fingerprint(followed.module).digest == first.digest


def test_settle_names_a_weight_that_a_forward_moves():
    """Rows computed while a weight or a float buffer moved must not be stored."""

    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.mean += 1
            return x + self.mean

    followed = Followed(frozen(Moving()))
    followed.check()
    followed.module(torch.ones(1, 3))
    assert followed.identity.settle(followed.module) == "mean"
    followed = Followed(frozen(nn.Linear(2, 2)))
    assert followed.identity.settle(followed.module) is None
    followed.check()
    followed.module(torch.ones(1, 2))
    assert followed.identity.settle(followed.module) is None


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_old_style_norms_have_one_state(norm):
    """The weight that a pre-hook computes before every forward is no content; what it comes from is."""
    with pytest.warns(FutureWarning) if norm is nn.utils.weight_norm else _no_warning():
        module = frozen(norm(nn.Linear(3, 3)))
    followed = Followed(module)
    before = followed.state()
    for _ in range(3):
        module(torch.ones(1, 3))
        assert followed.identity.settle(module) is None
        assert followed.states() == {before}
    original = module.weight_g if norm is nn.utils.weight_norm else module.weight_orig
    original.data.add_(1)
    assert followed.state() != before


def _no_warning():
    import contextlib

    return contextlib.nullcontext()


# --- fingerprints ---


def test_equal_modules_have_equal_fingerprints():
    """Content is what counts: two instances of one seed agree, another seed or one more layer does not."""

    def print_of(module):
        return Followed(module).identity.fingerprint(module)

    assert print_of(block()).digest == print_of(block()).digest
    assert print_of(block()).weights != print_of(block(1)).weights
    a, b = print_of(block()), print_of(block(1))
    assert {name for name in a.parts if a.parts[name] != b.parts.get(name)} == {
        "linear.weight",
        "linear.bias",
        "inside[0].weight",
        "inside[0].bias",
    }


def test_fingerprint_is_remembered_for_each_state():
    """Asked again, or after a detour, the same object is given; an undigested state keeps its number."""
    followed = Followed(block(), eager_bytes=0)
    before = followed.state()
    first = followed.identity.fingerprint(followed.module)
    assert followed.identity.fingerprint(followed.module) is first
    assert followed.state() == before
    followed.module.flag = 2
    assert followed.identity.fingerprint(followed.module).digest != first.digest
    followed.module.flag = 1
    assert followed.identity.fingerprint(followed.module) is first


def test_tied_weights_are_told():
    """Tying two equal weights is another content than two equal copies."""

    class Two(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = nn.Linear(2, 2)
            nn.init.ones_(self.a.weight)
            nn.init.ones_(self.b.weight)
            nn.init.zeros_(self.a.bias)
            nn.init.zeros_(self.b.bias)
            if tied:
                self.b.weight = self.a.weight

    tied, apart = Two(True), Two(False)
    assert Followed(tied).identity.fingerprint(tied).digest != Followed(apart).identity.fingerprint(apart).digest


def test_strides_do_not_count():
    """The same values in another memory layout are the same weights."""
    one, other = nn.Linear(3, 5), nn.Linear(3, 5)
    other.load_state_dict(one.state_dict())
    other.weight.data = one.weight.data.t().contiguous().t()
    assert Followed(one).identity.fingerprint(one).digest == Followed(other).identity.fingerprint(other).digest


def test_wrapping_classes_do_not_count():
    """A dynamic subclass marked by its owner has the fingerprint of the class below it."""
    module = block()
    before = Followed(module).identity.fingerprint(module).digest
    module.__class__ = type("Block", (Block,), {"_modcache_original": Block, "forward": lambda self, x: x})
    assert Followed(module).identity.fingerprint(module).digest == before


PROCESS = """
    import sys, torch
    sys.path.insert(0, sys.argv[1])
    from transformers import BertConfig, BertModel
    from modcache.fingerprint import Identity, callable_digest
    from tests.test_fingerprint import Block, block, CALLABLES
    torch.manual_seed(0)
    bert = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2)).eval()
    bert.save_pretrained(sys.argv[2])
    for module in (bert, BertModel.from_pretrained(sys.argv[2]).eval(), block()):
        print(Identity().fingerprint(module).digest.hex())
    for fn in CALLABLES:
        print(callable_digest(fn)[0].hex())
"""


def test_two_processes_agree(tmp_path):
    """Digests are the same in another process, with another hash seed, and loaded from another folder."""
    root = str(Path(__file__).resolve().parent.parent)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), root, str(tmp_path / seed)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )
        for seed in ("1", "2")
    ]
    one, other = [run.communicate()[0].split() for run in runs]
    assert one == other
    assert len(one) == 3 + len(CALLABLES)


def made(n):
    return lambda x: x + n


def listed(items):
    return lambda x: items


CALLABLES = [
    lambda x: x + 1,
    lambda x: x + 2,
    lambda x: x + 1.0,
    lambda x: x in {"a", "b", "c", "d"},
    made(1),
    made(2),
    made(True),
    lambda x: [y * SCALE for y in x],
    lambda x: lambda: x + SCALE,
    listed([1]),
    listed([2]),
    listed({"a": (1, 2.5)}),
    helper,
    len,
    str.upper,
    Config,
    Config().__init__,
    nn.Linear,
    torch.relu,
]


def test_callables_differ_by_what_they_do():
    """No two of the table agree, on one line or not."""
    digests = [callable_digest(fn)[0] for fn in CALLABLES]
    assert len(set(digests)) == len(digests)


def test_two_lambdas_of_one_line_differ_and_equal_code_agrees():
    """Where code stands does not matter, what it does is all that counts."""
    one, other = (lambda x: x + 1), (lambda x: x + 2)
    assert callable_digest(one) != callable_digest(other)
    namespace, elsewhere = {}, {}
    exec("def f(x):\n    y = x\n    return y", namespace)
    exec("\n\n\ndef f(x):\n    z = x\n    return z", elsewhere)
    assert callable_digest(namespace["f"]) == callable_digest(elsewhere["f"])


def test_a_closure_over_a_list_is_read_anew():
    """A list that a hook closes over counts by content, and its change is seen at the next check."""
    items = [1]
    module = frozen(nn.Sequential(nn.Linear(2, 2)))
    module[0].register_forward_hook(lambda m, args, out: out * len(items))
    followed = Followed(module)
    before = followed.state()
    items.append(2)
    assert followed.state() != before
    items.pop()
    assert followed.state() == before


class Doubled(prune.CustomFromMask):
    def apply_mask(self, module):
        return 2 * super().apply_mask(module)


def test_a_hook_of_the_root_that_computes_its_weight_counts():
    """It runs around the forward like others, but what the forward reads depends on how it does that."""
    digests = set()
    for method in (prune.CustomFromMask, Doubled):
        torch.manual_seed(0)
        module = frozen(nn.Linear(2, 2))
        method.apply(module, "weight", mask=torch.ones(2, 2))
        digests.add(Followed(module).identity.fingerprint(module).digest)
    assert len(digests) == 2


class Raising(collections.abc.Mapping):
    """Like a mapping of weights that lie elsewhere: its keys are not those that it takes."""

    def __iter__(self):
        return iter(["a"])

    def __len__(self):
        return 1

    def __getitem__(self, key):
        raise KeyError(key)


def test_what_raises_when_it_is_read_is_listed():
    """Objects of somebody's own, and mocks that say they are functions, count by their class where they raise."""

    def helper(x):
        return x

    for value, name in ((Raising(), "Raising"), (mock.create_autospec(helper), "")):
        module = frozen(nn.Identity())
        module.held = {"inside": value}
        found = Followed(module).identity.fingerprint(module)
        assert any(name in place for place in found.opaque)


def test_what_has_no_content_is_listed():
    """A lock counts by its class, and is named."""
    lock = threading.Lock()
    _, opaque = callable_digest(lambda x: lock)
    assert len(opaque) == 1
    assert "lock" in opaque[0]


def test_context_tells_what_changes_results():
    """Autocast, precision, default dtype and determinism each give another context."""
    plain = context()
    assert hash(plain) == hash(context())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert context() != plain
        assert context_facts(context())["autocast dtype (cpu)"] is torch.bfloat16
    try:
        torch.set_default_dtype(torch.float64)
        assert context() != plain
    finally:
        torch.set_default_dtype(torch.float32)
    try:
        torch.set_float32_matmul_precision("high")
        assert context() != plain
    finally:
        torch.set_float32_matmul_precision("highest")
    try:
        torch.use_deterministic_algorithms(True)
        assert context() != plain
    finally:
        torch.use_deterministic_algorithms(False)
    assert context() == plain


class Slotted:
    __slots__ = ("__weakref__", "a", "empty")

    def __init__(self):
        self.a = 1


class Node:
    def __init__(self, depth):
        self.next = Node(depth - 1) if depth else self


class Mode(enum.Enum):
    FAST = 1


class PreTrainedTokenizerBase:
    def __init__(self):
        self.vocabulary = {"a": 1}


class Wrapped(collections.UserDict):
    pass


@functools.lru_cache
def remembered(x):
    return helper(x)


def reads_modules(x):
    return np.add(x, code.of_library("a"))


def reads_weights(x):
    return GLOBAL_TENSOR @ x, GLOBAL_ARRAY, GLOBAL_MODULE(x), GLOBAL_META


GLOBAL_TENSOR = torch.ones(2)
GLOBAL_META = torch.ones(2, device="meta")
GLOBAL_ARRAY = np.ones(2)
GLOBAL_MODULE = nn.Linear(1, 1)


class Everything:
    number = 1

    def method(self):
        return self

    @staticmethod
    def static():
        return 1

    @classmethod
    def of(cls):
        return cls

    @property
    def size(self):
        return 1

    @functools.cached_property
    def area(self):
        return 2

    @torch.no_grad()
    def quiet(self):
        return 3

    def with_default(self, x=[1], *rest, key=2, **more):  # noqa: B006
        return x, rest, key, more


def unfilled():
    def inner():
        return later

    if not inner:
        later = 1
    return inner


def marked(x):
    return x


marked.scale = 2
VALUES = [
    Slotted(),
    object(),
    Node(3),
    Node(40),
    Mode.FAST,
    PreTrainedTokenizerBase(),
    Wrapped(a=1),
    {"a": (1, 2)},
    {1, 2},
    frozenset({1, 3}),
    collections.deque([1, 2]),
    list(range(5000)),
    dict.fromkeys(range(5001)),
    [Slotted() for _ in range(300)],
    np.array([None, "a"], dtype=object),
    np.arange(3),
    np.arange(6).reshape(2, 3)[::-1, ::2],
    np.float32(1),
    types.SimpleNamespace(a=1),
    bytearray(b"abc"),
    re.compile("a+"),
    dt.date(2020, 1, 2),
    fractions.Fraction(1, 3),
    list[int],
    typing.Optional[int],  # noqa: UP045  # a special form is the case
    Path("a") / "b",
    weakref.ref(GLOBAL_MODULE),
    math,
    remembered,
    reads_modules,
    reads_weights,
    functools.partial(helper, 1),
    Everything,
    Everything().method,
    Everything.with_default,
    Everything.size,
    vars(Everything)["static"],
    vars(Everything)["of"],
    vars(Everything)["area"],
    "".join,
    str.join,
    str.__len__,
    vars(Slotted)["a"],
    unfilled(),
    marked,
    functools.wraps(helper)(lambda x: x),
    torch.no_grad()(lambda x: x),
    F.relu,
    GLOBAL_TENSOR,
    GLOBAL_META,
    GLOBAL_MODULE,
    torch.Generator(),
]


@pytest.mark.parametrize("at", range(len(VALUES)))
def test_any_value_can_be_an_attribute(at):
    """Whatever lies in an attribute is read without an error, stays still, and is told from the others."""
    module = frozen(nn.Linear(1, 1))
    module.value = VALUES[at]
    followed = Followed(module)
    before = followed.state()
    assert followed.states() == {before} or followed.check().trainable or followed.check().unreadable
    found = followed.identity.fingerprint(module).digest
    del module.value
    module.value = VALUES[at - 1]
    assert followed.identity.fingerprint(module).digest != found
    assert callable_digest(VALUES[at])[0] == callable_digest(VALUES[at])[0]


CALLS = 0


class Outside(nn.Module):
    """A forward that counts in a global, in its class and in a closure."""

    calls = 0

    def forward(self, x):
        global CALLS
        CALLS += 1
        type(self).calls += 1
        return x


def test_counters_outside_the_module_are_bookkeeping():
    """What a forward counts in globals, classes and closures does not count either."""
    module = frozen(nn.Sequential(Outside()))
    count = 0

    def hook(*args):
        nonlocal count
        count += 1

    module[0].register_forward_hook(hook)
    followed = Followed(module)
    before, first = followed.state(), followed.identity.fingerprint(module).digest
    for _ in range(3):
        module(torch.ones(1))
        assert followed.identity.settle(module) is None
        assert followed.states() == {before}
    found = followed.identity.fingerprint(module)
    assert found.digest == first
    assert len(found.bookkeeping) == 3


def test_a_removed_or_replaced_leaf_of_a_forward_is_told():
    """A forward that replaces a parameter, or takes one away, gives rows that must not be stored."""

    class Replacing(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.value = value

        def forward(self, x):
            self.weight = self.value
            return x

    for value in (nn.Parameter(torch.zeros(2)), None):
        followed = Followed(frozen(Replacing(value)))
        followed.check()
        followed.module(torch.ones(1))
        assert followed.identity.settle(followed.module) == "weight"


def test_large_weights_settle_without_a_digest():
    """Bookkeeping of an undigested module keeps its number, too."""
    followed = Followed(frozen(Chatty()), eager_bytes=0)
    before = followed.state()
    followed.module(torch.ones(1, 2))
    assert followed.identity.settle(followed.module) is None
    assert followed.states() == {before}


def test_settle_before_a_check_has_nothing_to_say():
    """Without a look there is nothing to compare with."""
    followed = Followed(block())
    assert followed.identity.settle(followed.module) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_children_cannot_be_read():
    """A scripted child keeps its code and weights to itself."""
    followed = Followed(frozen(nn.Sequential(torch.jit.trace(nn.Linear(2, 2).eval(), torch.ones(1, 2)))))
    assert followed.check().unreadable
    assert followed.check() is followed.check()


def test_compiled_children_count_by_what_was_compiled():
    """What torch.compile keeps for itself is no content; the weights inside are seen."""
    followed = Followed(frozen(nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))))
    before = followed.state()
    assert "0._orig_mod.weight" in followed.identity.fingerprint(followed.module).parts
    followed.module[0]._orig_mod.weight.data.add_(1)
    assert followed.state() != before


def test_a_shared_child_is_walked_once_and_tied():
    """A module of two names is one module, and that it is one is content."""
    linear = nn.Linear(2, 2)
    shared, apart = nn.Sequential(linear, linear), nn.Sequential(linear, copy.deepcopy(linear))
    one, other = (Followed(frozen(m)).identity.fingerprint(m) for m in (shared, apart))
    assert "1.weight" not in one.parts
    assert one.digest != other.digest


def test_inference_tensors_have_no_counter():
    """Weights made in inference mode are watched without their version."""
    with torch.inference_mode():
        module = frozen(nn.Linear(3, 3))
    followed = Followed(module)
    before = followed.state()
    assert followed.states() == {before}
    with torch.inference_mode():
        module.weight.add_(1)
    assert followed.state() != before


def test_a_copy_or_pickle_of_an_identity_starts_anew():
    """Options are kept, what was looked at is not."""
    followed = Followed(block(), version="1", eager_bytes=5)
    followed.check()
    for other in (copy.deepcopy(followed.identity), pickle.loads(pickle.dumps(followed.identity))):
        assert (other._version, other._eager_bytes, other._look) == ("1", 5, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_can_look():
    """A child forked while another thread holds the lock is not held up by it."""
    followed = Followed(block())
    followed.check()
    taken, done = threading.Event(), threading.Event()

    def hold():
        with followed.identity._lock:
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    child = os.fork()
    if not child:
        followed.module.flag = 3
        os._exit(0 if followed.state() == 1 else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_modules_of_python_are_followed_by_attribute():
    """A function read as an attribute of the user's module counts by its code, as does a constant there."""
    own = types.ModuleType("own_helpers")
    exec("FACTOR = 2\ndef scale(x): return x * FACTOR", vars(own))
    namespace = {"own": own, "__name__": "own_main"}
    exec("def f(x): return own.scale(x)", namespace)
    before = callable_digest(namespace["f"])
    own.FACTOR = 3
    changed = callable_digest(namespace["f"])
    exec("def scale(x): return x + FACTOR", vars(own))
    assert len({before, changed, callable_digest(namespace["f"])}) == 3


def test_context_before_torch_2_9(monkeypatch):
    """Where torch has the older getters only, those are read."""
    import importlib

    settings = importlib.import_module("modcache.fingerprint.context")
    monkeypatch.setattr(settings, "_fp32", None)
    assert len(settings.context()) == len(context())


INSTALLED = """
import torch
LIMIT = 2
SIZES = (1, (2,))
CACHE = {}
def used(x): return [y * LIMIT + SIZES[0] for y in x]
def unused(x): return CACHE, LIMIT
class Model(torch.nn.Module):
    rate = 3
    def forward(self, x): return self.inner(x)
    def inner(self, x): return used(x)
    def download(self, x): return unused(x)
"""


def installed_module(monkeypatch, source):
    module = types.ModuleType("installed_models")
    module.__file__ = "/somewhere/site-packages/installed_models.py"
    monkeypatch.setitem(sys.modules, "installed_models", module)
    exec(source, vars(module))
    return module


def test_installed_code_is_followed_from_forward_only(monkeypatch):
    """Of an installed class, what forward leads to is followed; the rest counts by its own code."""
    module = installed_module(monkeypatch, INSTALLED)
    model = frozen(module.Model())

    def found():
        return Followed(model).identity.fingerprint(model)

    before = found()
    assert "code of installed_models.used" in before.parts
    assert "code of installed_models.unused" not in before.parts
    module.CACHE["a"] = 1
    assert found().digest == before.digest
    module.LIMIT = 3
    assert found().digest != before.digest
    module.LIMIT = 2
    assert found().digest == before.digest
    module.SIZES = (1, (3,))
    assert found().digest != before.digest
    module.SIZES = (1, (2,))
    module.Model.download = lambda self, x: x
    assert found().digest != before.digest


LOADING = """
SESSION = "a"
SCALE = 2
class Auto:
    @classmethod
    def from_pretrained(cls): return cls.download()
    @classmethod
    def download(cls): return SESSION
def fetch(): return SESSION
def scaled(x): return x * SCALE
"""
OWN = """
import torch
from installed_models import Auto, fetch, scaled
WIDTH, RATE = 2, 1
def load(): return fetch(), Auto.from_pretrained()
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        Auto.from_pretrained()
        self._build()
    def _build(self):
        load()
        self.layer = torch.nn.Linear(2, WIDTH)
    def forward(self, x): return getattr(self, "_in" + "ner")(self.scaled(x))
    def _inner(self, x): return x * RATE
    def scaled(self, x): return scaled(x)
"""


def test_what_builds_a_module_is_not_followed_into_installed_code(monkeypatch):
    """Loading a checkpoint reads what differs from process to process; what came of it is in the module.

    The user's own code counts wherever a method leads, also one that nothing calls by its name.
    """
    library = installed_module(monkeypatch, LOADING)
    own = types.ModuleType("own_models")
    monkeypatch.setitem(sys.modules, "own_models", own)
    exec(OWN, vars(own))
    followed = Followed(frozen(own.Model()))
    before, digest = followed.state(), followed.identity.fingerprint(followed.module).digest
    library.SESSION = "b"
    assert followed.states() == {before}
    assert Followed(followed.module).identity.fingerprint(followed.module).digest == digest
    for namespace, name in ((library, "SCALE"), (own, "RATE"), (own, "WIDTH")):
        before = followed.state()
        setattr(namespace, name, 7)
        assert followed.states() != {before}, name


class Settings(collections.OrderedDict):
    """Like the configuration of a diffusers model: items that are attributes, too."""

    def __init__(self, **items):
        super().__init__(**items)
        vars(self).update(items)


def test_the_folder_that_settings_came_from_is_no_content():
    """Also where the settings are items of a mapping made for them; in a plain dict, any item counts."""
    digests = {}
    for kind in (Settings, dict):
        for folder, rate in (("a", 1), ("b", 1), ("b", 2)):
            module = frozen(nn.Identity())
            module.config = kind(_name_or_path=folder, _use_default_values=[folder], rate=rate)
            digests[kind, folder, rate] = Followed(module).identity.fingerprint(module).digest
    assert digests[Settings, "a", 1] == digests[Settings, "b", 1]
    assert len(set(digests.values())) == 5


def test_settings_of_timm_without_where_weights_came_from():
    """The folder of a checkpoint is no content of a timm model; what its settings say of the input is."""
    digests = {}
    for file, mean in (("a", 0.5), ("b", 0.5), ("b", 0.4)):
        module = frozen(nn.Identity())
        module.pretrained_cfg = {"file": file, "url": file, "mean": (mean,) * 3}
        module.default_cfg = module.pretrained_cfg
        digests[file, mean] = Followed(module).identity.fingerprint(module).digest
    assert digests["a", 0.5] == digests["b", 0.5] != digests["b", 0.4]


REMOTE = """
import torch
RATE = 2
def scaled(x): return x * RATE
class Model(torch.nn.Module):
    def forward(self, x): return scaled(x)
"""


def test_code_that_comes_with_a_model_goes_by_its_own_name(monkeypatch):
    """Transformers imports such code under the name of the model's folder or commit, which says nothing of it."""
    digests = []
    for folder, source in (
        ("one.abc", REMOTE),
        ("two.def", REMOTE),
        ("two.def", REMOTE.replace("RATE = 2", "RATE = 3")),
    ):
        own = types.ModuleType(f"transformers_modules.{folder}.modeling_own")
        monkeypatch.setitem(sys.modules, own.__name__, own)
        exec(source, vars(own))
        module = frozen(own.Model())
        digests.append(Followed(module).identity.fingerprint(module).digest)
    assert digests[0] == digests[1] != digests[2]


def function_of(source):
    namespace = {}
    exec(source, namespace)
    return namespace["f"]


def test_docstrings_and_imports_from_the_future_are_no_code():
    """A function does the same with and without; a text that it returns counts, also where it is the docstring."""
    plain = callable_digest(function_of("def f(x):\n    return x + 'a'"))
    for source in (
        "def f(x):\n    'A docstring.'\n    return x + 'a'",
        "from __future__ import annotations\ndef f(x):\n    'Another.'\n    return x + 'a'",
    ):
        assert callable_digest(function_of(source)) == plain
    texts = [callable_digest(function_of(f"def f(x):\n    {text!r}\n    return {text!r}")) for text in "ab"]
    assert texts[0] != texts[1]
    assert callable_digest(function_of("f = lambda x: 'a'")) != callable_digest(function_of("f = lambda x: 'b'"))


def test_what_dynamo_notes_on_a_function_is_no_content():
    """`torch.compiler.disable` numbers what it wraps, in each process anew."""

    def helper(x):
        return x + 1

    digests = set()
    for number in range(2):
        wrapped = functools.wraps(helper)(lambda x: helper(x) + 1)
        wrapped._torchdynamo_wrapper_id = number
        wrapped._torchdynamo_orig_callable = helper
        digests.add(callable_digest(wrapped))
    assert len(digests) == 1


def checked_as_by_beartype(inner, address):
    """The function in a check of its argument, made as beartype makes it: by text, with addresses in it."""
    source = f"def check(x, *, __beartype_func={address}):\n    assert x != {address}\n    return inner(x)"
    namespace = {"inner": inner}
    exec(compile(source, f"<@beartype(check) at {address:#x}>", "exec"), namespace)
    return functools.wraps(inner)(namespace["check"])


def test_a_check_by_beartype_is_no_content():
    """It is made anew in each process and does nothing but refuse arguments; what it checks counts."""
    digests = [callable_digest(checked_as_by_beartype(lambda x: x + 1, address)) for address in (7000, 8000)]
    assert digests[0] == digests[1]
    assert callable_digest(checked_as_by_beartype(lambda x: x + 2, 7000)) != digests[0]


NOTING = """
import torch
class Model(torch.nn.Module):
    rate = 3
    @classmethod
    def switchable(cls):
        if getattr(cls, "_switchable", None) is None:
            cls._switchable = True
        return cls._switchable
    @classmethod
    def use(cls, backend):
        cls._backend = backend
    def forward(self, x): return x * len(getattr(self, "_backend", "")) + len(self._backend)
"""


@pytest.mark.parametrize("whose", ["installed", "the user's"])
def test_what_an_installed_class_notes_of_itself_is_no_content(monkeypatch, whose):
    """An answer that only the class method reads that noted it comes and goes with what else a process builds."""
    module = installed_module(monkeypatch, NOTING)
    module.Model.use("a")
    cls = module.Model if whose == "installed" else type("Own", (module.Model,), {"__module__": __name__})
    followed = Followed(frozen(cls()))
    before, digest = followed.state(), followed.identity.fingerprint(followed.module).digest
    cls.switchable()
    assert followed.states() == {before}
    assert Followed(followed.module).identity.fingerprint(followed.module).digest == digest
    for edit in (lambda: cls.use("abc"), lambda: setattr(cls, "more", 1), lambda: setattr(cls, "more", 2)):
        before = followed.state()
        edit()
        assert followed.states() != {before}


# --- threads, copies, speed ---


def test_threads_agree():
    """Many threads that check at once, while the weights move, end in one state and no error."""
    followed = Followed(block())
    followed.check()
    errors = []

    def look():
        try:
            for _ in range(200):
                followed.check()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        followed.module.linear.weight.data.add_(1)
        time.sleep(0.002)
    for thread in threads:
        thread.join()
    assert not errors
    followed.states()
    assert followed.state() == Followed.state(followed)


def test_nothing_keeps_the_module_alive():
    """A module and its identity are freed together, without the garbage collector."""
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        module = frozen(nn.Sequential(nn.Linear(2, 2)))
        followed = Followed(module)
        followed.check()
        module(torch.ones(1, 2))
        followed.identity.settle(module)
        gone = weakref.ref(module)
        del module, followed
        assert gone() is None
    finally:
        gc.enable()


def test_drop_lets_go_of_old_weights():
    """After a drop nothing holds the memory of weights that were replaced."""
    import weakref

    followed = Followed(frozen(nn.Linear(4, 4)))
    before = followed.state()
    gone = weakref.ref(followed.module.weight)
    followed.module.weight = nn.Parameter(followed.module.weight.clone(), requires_grad=False)
    followed.identity.drop()
    assert gone() is None
    assert followed.state() == before


def test_a_check_is_cheap():
    """A still check of a small model costs a small part of running it."""
    module = frozen(nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]))
    followed = Followed(module)
    followed.check()
    x = torch.ones(512, 64)

    def best(call):
        times = []
        for _ in range(20):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(followed.check) < best(lambda: module(x))


def test_all_sets_of_windows_come_round():
    """Whichever window a write falls into, it is seen within a round of checks."""
    for row in range(8):
        followed = Followed(frozen(nn.Linear(16, 8)))
        before = followed.state()
        followed.module.weight.numpy()[row] += 1
        followed.states()
        assert followed.state() != before


# --- accelerators ---


def test_device_probe_tells_at_a_later_turn():
    """A difference is told once its comparison has come back, and not before it was there."""
    tensors = [
        torch.arange(1.0, 500.0),
        torch.ones(3, dtype=torch.bfloat16),
        torch.empty(0),
        torch.ones(2, 2).t()[:1],
    ]
    probe = DeviceProbe(tensors)
    assert not any(probe.differs() for _ in range(20))
    tensors[0] += 1
    assert any(probe.differs() for _ in range(20))
    renewed = probe.renewed()
    assert not any(renewed.differs() for _ in range(20))


def test_device_probe_of_nothing_is_still():
    """Tensors without elements give nothing to compare."""
    assert not DeviceProbe([torch.empty(0)]).differs()


def test_device_probe_waits_for_nothing():
    """While a comparison is under way nothing is read and nothing is launched."""

    class Event:
        ready = False

        def query(self):
            return self.ready

    tensor = torch.ones(100)
    probe = DeviceProbe([tensor])
    probe.differs()
    event = Event()
    tensor += 1
    probe._launch(0)
    probe._waiting = (probe._waiting[0], event)
    assert not probe.differs()
    event.ready = True
    assert probe.differs()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_on_a_gpu_are_probed_without_synchronising():
    """A write behind autograd's back on a GPU is noticed, and no check waits for the device."""
    followed = Followed(frozen(nn.Linear(512, 512).cuda()))
    before = followed.state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            followed.check()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    followed.module.weight.data.add_(1)
    on_host = Followed(frozen(copy.deepcopy(followed.module).cpu()))
    for _ in range(40):
        followed.check()
        torch.cuda.synchronize()
    assert followed.state() != before
    a = followed.identity.fingerprint(followed.module)
    assert a.weights == on_host.identity.fingerprint(on_host.module).weights


def test_a_late_answer_from_a_device_drops_what_was_known():
    """Weights of which the probe says that something differs, but not what, are digested again."""
    followed = Followed(frozen(nn.Linear(4, 4)))
    before = followed.state()
    watch = followed.identity._look.watch
    watch._device_probes = [DeviceProbe([torch.ones(3)])]
    watch._device_probes[0]._expected = [e + 1 for e in watch._device_probes[0]._expected]
    followed.states()
    assert followed.identity.late_moves == 1
    assert followed.state() == before


def test_a_lambda_of_no_module_or_of_a_library_counts_by_its_code():
    """What a name does not lead to is told apart by what it does, wherever it says that it comes from."""
    made: dict[str, object] = {}
    exec("one = lambda x: x + 1\ntwo = lambda x: x + 2", {"__name__": "torch.nn"}, made)
    exec("three = lambda x: x + 3", {"__name__": None}, made)
    digests = {callable_digest(function)[0] for function in made.values()}

    assert len(digests) == 3


@pytest.mark.parametrize("kind", ["cpu", "xpu"])
def test_autocast_of_any_device_is_part_of_the_context(kind):
    """Autocast changes what a forward gives, on whatever device it is switched on."""
    before = context()
    with torch.autocast(kind, dtype=torch.bfloat16):
        within = context()

    assert before != within
    assert before == context()


def test_fingerprints_of_many_states_are_not_all_remembered():
    """A module with a state a step does not gather a fingerprint for each of them."""
    layer = nn.Linear(2, 2).requires_grad_(False).eval()
    identity = Identity()
    for _ in range(80):
        layer.weight.add_(1.0)
        identity.check(layer, False)
        identity.check(layer, False)
        identity.fingerprint(layer)

    assert len(identity._fingerprints) <= 64


def test_a_state_that_was_forgotten_is_a_new_one_when_it_comes_back(monkeypatch):
    """Of very many states the latest are known again; a number never comes to mean another state."""
    monkeypatch.setattr("modcache.fingerprint.identity._KNOWN_STATES", 3)
    layer = nn.Linear(2, 2).requires_grad_(False).eval()
    identity, states = Identity(), {}
    for value in (0.0, 1.0, 2.0, 3.0, 4.0, 3.0, 0.0):
        layer.weight.fill_(value)
        identity.check(layer, False)
        states.setdefault(value, []).append(identity.check(layer, False).state)
    assert states[3.0][0] == states[3.0][1]
    numbers = [number for seen in states.values() for number in set(seen)]
    assert len(numbers) == len(set(numbers)) == 6
