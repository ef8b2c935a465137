"""The fingerprint: what moves the state of a module, what does not, and what comes back."""

import copy
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from modcache.fingerprint import UNDETERMINED, Identity, callable_digest, context, context_facts

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
    "hook on the root": forward_hook("hook", ""),
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
    "module in a list": lambda m: (
        m.inside[0].weight.data.add_(1) is None or (lambda: m.inside[0].weight.data.sub_(1))
    ),
    "forward of a class of torch": class_forward,
    "forward of the class": own_class_forward,
    "forward of an instance": instance_forward,
    "global constant": constant,
    "global function": global_function,
    "code of a function": new_code,
    "swap_tensors": swapped_tensors,
}
INEXACT = {"module in a list", "weight_norm"}  # undoing rounds


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
    assert after != before and after != UNDETERMINED
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
