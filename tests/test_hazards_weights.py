"""Whatever is done to a module's weights, code or configuration, no row of before is served after."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from modcache import CacheWarning, MemoryStore, StaleRecordError, cache_of, cached_module
from tests.hazards import Encoder, Quiet, agree, bypassed, computed, frozen, hits, pair

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def twice(change, module=None, x=X):
    """Fill, change the cached and the plain module in the same way, compare."""
    cached, plain = pair(module)
    agree(cached, plain, x)
    before = plain(x)
    with Quiet():
        change(cached)
        change(plain)
        agree(cached, plain, x, times=3)
    after = plain(x)
    assert not torch.equal(before, after), "the change does not change the output: the case proves nothing"
    return cached, plain


def by_optimizer(m):
    m.requires_grad_(True)
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(m.parameters(), 0.5)
    from modcache import mode

    with mode("off"):
        m(X).square().mean().backward()
    optimizer.step()
    m.zero_grad()
    m.requires_grad_(False)


def by_load(m):
    torch.manual_seed(2)
    m.load_state_dict(Encoder().state_dict())


def by_assign(m):
    torch.manual_seed(2)
    m.load_state_dict(Encoder().state_dict(), assign=True)
    m.requires_grad_(False)


def by_data_dense(m):
    m.last.weight.data.mul_(1.5)


def by_data_replaced(m):
    m.last.weight.data = m.last.weight.data * 1.5


def by_numpy(m):
    m.last.weight.detach().numpy()[:] *= 1.5


def by_half(m):
    m.half().float()


def by_double(m):
    m.double().float()
    m.last.weight.data.add_(1)


def by_swap(m):
    torch.manual_seed(3)
    m.first = frozen(nn.Linear(4, 8))


def by_class_swap(m):
    m.drop = nn.Tanh()


def by_new_parameter(m):
    m.last.weight = nn.Parameter(m.last.weight * 2, requires_grad=False)


def by_parametrization(m):
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    parametrize.register_parametrization(m.last, "weight", Double())


def by_weight_norm(m):
    parametrizations.weight_norm(m.last)
    m.last.parametrizations.weight.original0.data.mul_(3)
    m.requires_grad_(False)


def by_root_forward_hook(m):
    m.register_forward_hook(lambda m, a, out: out * 2)


def by_root_pre_hook(m):
    m.register_forward_pre_hook(lambda m, a: (a[0] * 2,))


def by_child_hook(m):
    m.norm.register_forward_hook(lambda m, a, out: out * 2)


def by_child_pre_hook(m):
    m.last.register_forward_pre_hook(lambda m, a: (a[0] * 2,))


def by_buffer(m):
    m.shift += 1


def by_buffer_replaced(m):
    m.shift = torch.ones(3)


def by_attribute(m):
    m.scale = 2.0


def by_child_attribute(m):
    m.norm.eps = 1.0


def by_instance_child_forward(m):
    inner = m.norm.forward
    m.norm.forward = lambda x: inner(x) * 2


def by_set_(m):
    with torch.no_grad():
        m.last.weight.set_(torch.ones(3, 8))


def by_copy_(m):
    with torch.no_grad():
        m.last.weight.copy_(torch.ones(3, 8))


def by_inference_write(m):
    with torch.inference_mode():
        m.last.weight.mul_(1.5)


def by_vector(m):
    vector = nn.utils.parameters_to_vector(m.parameters())
    nn.utils.vector_to_parameters(vector * 1.5, m.parameters())


def by_prune(m):
    from torch.nn.utils import prune

    prune.l1_unstructured(m.last, "weight", 0.5)
    m.requires_grad_(False)


def by_storage(m):
    m.last.weight.untyped_storage().copy_(torch.ones(24).untyped_storage())


def by_share(m):
    m.norm.weight = nn.Parameter(m.norm.bias.data, requires_grad=False)


def by_lazy_attr(m):
    m.last.bias = None


CHANGES = [value for name, value in sorted(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_change_of_a_module_is_seen(change):
    """After a change the module answers as a plain one that was changed in the same way."""
    twice(change)


def test_hook_removed():
    """Taking a child's hook away brings the rows from before it was there."""
    cached, plain = pair()
    handles = [m.norm.register_forward_hook(lambda m, a, out: out * 2) for m in (cached, plain)]
    agree(cached, plain, X)
    for handle in handles:
        handle.remove()
    agree(cached, plain, X)


def test_global_hook():
    """A global forward hook changes what children give; it is seen, and so is its going."""
    cached, plain = pair()
    agree(cached, plain, X)
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, a, out: out * 2 if isinstance(m, nn.LayerNorm) else None
    )
    try:
        agree(cached, plain, X)
    finally:
        handle.remove()
    agree(cached, plain, X)


def test_config_object_mutated():
    """A field of a config object that the forward reads is part of what the module is."""

    class Configured(Encoder):
        def __init__(self):
            super().__init__()
            self.config = types.SimpleNamespace(gain=1.0, names={"a": [1.0]})

        def forward(self, x):
            return super().forward(x) * self.config.gain * self.config.names["a"][0]

    def gain(m):
        m.config.gain = 3.0

    def deep(m):
        m.config.names["a"][0] = 2.0

    twice(gain, Configured())
    twice(deep, Configured())


def test_attribute_one_and_true():
    """1, 1.0 and True are three values of an attribute, because a forward may tell them apart."""

    class Typed(Encoder):
        def __init__(self):
            super().__init__()
            self.flag = 1

        def forward(self, x):
            return super().forward(x) * (2 if self.flag is True else 1)

    def set_true(m):
        m.flag = True

    twice(set_true, Typed())


def test_tensor_attribute_and_list():
    """A tensor in a plain attribute or a list is a weight too."""

    class Hidden(Encoder):
        def __init__(self):
            super().__init__()
            self.plain = [torch.ones(3)]
            self.more = {"a": (torch.ones(3),)}

        def forward(self, x):
            return super().forward(x) * self.plain[0] * self.more["a"][0]

    def one(m):
        m.plain[0].mul_(2)

    def two(m):
        m.plain[0] = torch.full((3,), 5.0)

    def three(m):
        m.more["a"][0].data.mul_(2)

    for change in (one, two, three):
        twice(change, Hidden())


def test_closure_and_default():
    """What a forward closes over, and its defaults, are part of the module."""
    factor = [2.0]

    def hook(m, a, out, by=factor):
        return out * by[0] * factor[0]

    cached, plain = pair()
    for m in (cached, plain):
        m.norm.register_forward_hook(hook)
    agree(cached, plain, X)
    factor[0] = 3.0
    agree(cached, plain, X)


GAIN = 1.0
TABLE = {"gain": 1.0}


class ReadsGlobals(Encoder):
    def forward(self, x):
        return super().forward(x) * GAIN * TABLE["gain"]


def test_globals():
    """A global that the forward reads is part of the module."""
    global GAIN
    cached, plain = pair(ReadsGlobals())
    agree(cached, plain, X)
    try:
        GAIN = 2.0
        agree(cached, plain, X)
        TABLE["gain"] = 3.0
        agree(cached, plain, X)
    finally:
        GAIN = 1.0
        TABLE["gain"] = 1.0


def test_function_replaced_in_class():
    """A forward that is patched onto the class is another forward."""

    class Patched(Encoder):
        pass

    cached, plain = pair(Patched())
    agree(cached, plain, X)
    Patched.forward = lambda self, x: Encoder.forward(self, x) * 7
    agree(cached, plain, X)


def test_method_replaced_on_class():
    """A method that the forward calls, replaced in its class, is noticed before a wrong row is served."""

    class Helped(Encoder):
        def helper(self, x):
            return x

        def forward(self, x):
            return self.helper(super().forward(x))

    cached, plain = pair(Helped())
    agree(cached, plain, X)
    Helped.helper = lambda self, x: x * 7
    agree(cached, plain, X)


def test_method_replaced_on_instance():
    """A method set on the instance is an attribute like any other."""

    class Helped(Encoder):
        def helper(self, x):
            return x

        def forward(self, x):
            return self.helper(super().forward(x))

    cached, plain = pair(Helped())
    agree(cached, plain, X)
    for m in (cached, plain):
        m.helper = lambda x: x * 7
    agree(cached, plain, X)


def test_two_lambdas_of_one_line():
    """Two lambdas of one line, as activation, as hook, as key, are two functions."""

    class Active(Encoder):
        def __init__(self):
            super().__init__()
            self.act = None

        def forward(self, x):
            return self.act(super().forward(x))

    one, two = (lambda x: x * 1.0), (lambda x: x * 2.0)
    store = MemoryStore(1 << 20)
    torch.manual_seed(0)
    base = frozen(Active())
    outs = []
    for act in (one, two):
        module = copy.deepcopy(base)
        module.act = act
        plain = copy.deepcopy(module)
        cached = cached_module(module, store=store)
        agree(cached, plain, X)
        outs.append(cached(X))
    assert not torch.equal(*outs)


def test_shared_store_other_weights():
    """Two modules of one class with other weights share a store and no row."""
    store = MemoryStore(1 << 20)
    (a, plain_a), (b, plain_b) = pair(Encoder(), store=store), pair(Encoder(), store=store)
    agree(a, plain_a, X)
    agree(b, plain_b, X)
    agree(a, plain_a, X)
    assert computed(b) == len(X)


def test_shared_store_same_weights():
    """Two modules of one content share their rows."""
    store = MemoryStore(1 << 20)
    base = frozen(Encoder())
    a, b = (cached_module(copy.deepcopy(base), store=store) for _ in range(2))
    a(X)
    assert torch.equal(a(X), b(X))
    assert cache_of(a).namespace == cache_of(b).namespace
    assert computed(b) == 0


def test_state_that_comes_back_is_known_again():
    """Weights that go and come back (EMA swaps, an adapter off and on) find their rows again."""
    cached, plain = pair()
    agree(cached, plain, X)
    first = copy.deepcopy(cached.state_dict())
    other = {name: value + 0.5 for name, value in first.items()}
    count = computed(cached)
    cached.load_state_dict(other), plain.load_state_dict(other)
    agree(cached, plain, X)
    for _ in range(3):
        for state in (first, other):
            cached.load_state_dict(state), plain.load_state_dict(state)
            agree(cached, plain, X)
    assert computed(cached) == count + len(X)


def test_ema_drift():
    """Weights that drift at every step are right at every step."""
    cached, plain = pair()
    with Quiet():
        for _step in range(12):
            for m in (cached, plain):
                with torch.no_grad():
                    for p in m.parameters():
                        p.lerp_(torch.full_like(p, 0.1), 0.05)
            agree(cached, plain, X, times=1)


def test_sparse_write_is_found_by_recheck():
    """A write of one element behind autograd's back is found by recheck at the latest."""
    big = frozen(nn.Linear(4, 4096))
    plain = copy.deepcopy(big)
    cached = cached_module(big)
    agree(cached, plain, X)
    for m in (cached, plain):
        m.weight.data[1234, 2] = 9.0
    cache_of(cached).recheck()
    agree(cached, plain, X)


def test_sparse_write_is_found_by_verify():
    """verify=1.0 finds a record that the module would not give now."""
    big = frozen(nn.Linear(4, 65536))
    cached = cached_module(big, verify=1.0)
    cached(X), cached(X)
    found = None
    for place in range(5000, 65536, 4099):
        big.weight.data[place, 2] += 9.0
        try:
            cached(X)
        except StaleRecordError as error:
            found = error
            break
        break
    assert found is None or "stored" in str(found)
    if found is None:  # the write was noticed at once: then the rows are right
        assert torch.equal(cached(X)[:, place], copy.deepcopy(cached_off(cached))(X)[:, place])


def cached_off(module):
    from modcache import uncached

    return uncached(module)


def test_late_numpy_write_everywhere_is_seen_at_once():
    """A write to all of one weight through numpy is seen at the next call, whatever the size."""
    big = frozen(nn.Linear(4, 50_000))
    plain = copy.deepcopy(big)
    cached = cached_module(big)
    agree(cached, plain, X)
    for m in (cached, plain):
        m.weight.detach().numpy()[:] += 1
    agree(cached, plain, X)


def test_buffer_not_persistent():
    """A buffer that is not in the state_dict counts too."""

    class Mask(Encoder):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(3), persistent=False)

        def forward(self, x):
            return super().forward(x) * self.mask

    def change(m):
        m.mask[0] = 5

    twice(change, Mask())


def test_tied_weights():
    """Weights tied and untied are seen."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    def write(m):
        m.a.weight.data.mul_(2)

    def untie(m):
        m.b.weight = nn.Parameter(m.b.weight.data * 3, requires_grad=False)

    twice(write, Tied())
    twice(untie, Tied())


def test_trainable_parameter_is_not_cached():
    """With grad mode on a trainable parameter bypasses; gradients flow as in the plain module."""
    cached, plain = pair()
    agree(cached, plain, X)
    for m in (cached, plain):
        m.last.weight.requires_grad_(True)
    with pytest.warns(CacheWarning, match="trainable"):
        out = cached(X)
    assert out.requires_grad
    out.sum().backward(), plain(X).sum().backward()
    torch.testing.assert_close(cached.last.weight.grad, plain.last.weight.grad)
    with torch.no_grad():
        agree(cached, plain, X)


def test_training_by_a_parent():
    """A parent's train() puts dropout back on: the module is bypassed, unless it was frozen."""
    cached, _ = pair()
    cached(X)
    parent = nn.Sequential(cached, nn.Linear(3, 1))
    parent.train()
    with pytest.warns(CacheWarning, match="training mode"):
        one = cached(X)
    assert not torch.equal(one, cached(X))
    parent.eval()
    stay = cached_module(Encoder(), freeze=True)
    nn.Sequential(stay).train()
    assert not stay.training
    assert not stay.drop.training
    assert torch.equal(stay(X), stay(X))


def test_direct_train_of_a_frozen_module_stays_in_eval():
    """freeze=True keeps eval mode, whoever calls train()."""
    stay = cached_module(Encoder(), freeze=True)
    assert stay.train() is stay
    assert not any(m.training for m in stay.modules())


def test_child_put_into_training_mode():
    """A child that is set to train by hand is random again, also below a frozen module."""
    cached = cached_module(Encoder(), freeze=True)
    cached(X)
    cached.drop.train()
    with pytest.warns(CacheWarning, match="training mode"):
        assert not torch.equal(cached(X), cached(X))


def test_autocast_and_dtypes():
    """Autocast on, off and of another dtype, and the default dtype, are other contexts."""
    cached, plain = pair()
    agree(cached, plain, X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(cached, plain, X, tolerance=5e-2)
        assert cached(X).dtype == plain(X).dtype
    agree(cached, plain, X)
    with torch.autocast("cpu", dtype=torch.float16):
        agree(cached, plain, X, tolerance=5e-2)
    with torch.autocast("cpu", enabled=False):
        agree(cached, plain, X)


def test_default_dtype():
    """A module that makes tensors of the default dtype is asked again under another one."""

    class Makes(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 2) * x[:, :2].mean()

    class PerRow(nn.Module):
        def forward(self, x):
            return torch.ones(2) * x[:, :2].to(torch.get_default_dtype())

    cached, plain = pair(PerRow())
    agree(cached, plain, X)
    torch.set_default_dtype(torch.float64)
    try:
        agree(cached, plain, X)
    finally:
        torch.set_default_dtype(torch.float32)
    agree(cached, plain, X)


def test_matmul_precision_is_another_namespace():
    """The precision of float32 products is part of the namespace."""
    cached, plain = pair()
    before = cache_of(cached).namespace
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert cache_of(cached).namespace != before
        agree(cached, plain, X)
    finally:
        torch.set_float32_matmul_precision(old)
    assert cache_of(cached).namespace == before


def test_deterministic_mode_is_another_namespace():
    """Deterministic algorithms are another context."""
    cached, _ = pair()
    before = cache_of(cached).namespace
    torch.use_deterministic_algorithms(True)
    try:
        assert cache_of(cached).namespace != before
    finally:
        torch.use_deterministic_algorithms(False)


def test_inference_mode_at_fill_and_training_later():
    """Rows stored under inference_mode feed a head that is trained."""
    cached, plain = pair()
    with torch.inference_mode():
        agree(cached, plain, X)
    head = nn.Linear(3, 1)
    out = cached(X)
    assert not out.is_inference()
    assert not out.requires_grad
    head(out).sum().backward()
    assert head.weight.grad is not None
    out.mul_(2)
    agree(cached, plain, X)


def test_hit_under_inference_mode():
    """A hit inside inference_mode may be used there; another one outside may be trained on."""
    cached, plain = pair()
    agree(cached, plain, X)
    with torch.inference_mode():
        agree(cached, plain, X)
    head = nn.Linear(3, 1)
    head(cached(X)).sum().backward()


def test_module_made_in_inference_mode():
    """Weights that are inference tensors (no version counter) are served and their edits seen."""
    with torch.inference_mode():
        module = frozen(Encoder())
    plain = copy.deepcopy(module)
    cached = cached_module(module)
    with torch.inference_mode():
        agree(cached, plain, X)
        for m in (cached, plain):
            m.last.weight.mul_(2)
        agree(cached, plain, X)


def test_input_needing_grad():
    """An input that needs grad bypasses, and its gradient is the plain module's."""
    cached, plain = pair()
    agree(cached, plain, X)
    a, b = X.clone().requires_grad_(), X.clone().requires_grad_()
    with pytest.warns(CacheWarning, match="needs grad"):
        out = cached(a)
    out.sum().backward()
    plain(b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_input_needing_grad_hidden_in_structures():
    """An input that needs grad is found in dicts, dataclasses, lists of dicts and shared arguments."""
    import dataclasses

    @dataclasses.dataclass
    class Pack:
        x: torch.Tensor

    class Takes(nn.Module):
        def forward(self, x):
            if isinstance(x, dict):
                return x["x"] * 2
            if isinstance(x, Pack):
                return x.x * 2
            return torch.stack([item["x"] if isinstance(item, dict) else item.x for item in x]) * 2

    cached, _ = pair(Takes())
    with Quiet():
        for make in (lambda x: {"x": x}, Pack, lambda x: [{"x": row} for row in x], lambda x: [Pack(row) for row in x]):
            x = X.clone().requires_grad_()
            out = cached(make(x))
            assert out.requires_grad, make
            out.sum().backward()
            assert x.grad is not None


def test_call_counter_attribute():
    """A call counter kept as an attribute is bookkeeping: rows keep hitting, and the module stays right."""

    class Counts(Encoder):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    cached, plain = pair(Counts())
    for _ in range(5):
        agree(cached, plain, X)
    assert hits(cached) >= 4 * len(X)
    assert any("calls" in place for place in cache_of(cached).manifest["bookkeeping"])


def test_call_counter_buffer():
    """A call counter kept in a buffer is bookkeeping."""

    class Counts(Encoder):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    cached, plain = pair(Counts())
    with Quiet():
        for _ in range(5):
            agree(cached, plain, X)
    assert hits(cached) >= 4 * len(X)


def test_output_depends_on_call_counter():
    """A module whose output follows its own counter is not served stale rows without a word."""

    class Drifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = 0

        def forward(self, x):
            self.step += 1
            return x + self.step

    cached, _plain = pair(Drifts())
    with pytest.warns(CacheWarning):
        cached(X)
        cached(X)
    one, two = cached(X), cached(X)
    assert not torch.equal(one, two)


def test_output_depends_on_a_buffer_that_drifts():
    """A running mean in a buffer is written by every call: no row stays valid."""

    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            self.mean.lerp_(x.mean(0), 0.5)
            return x - self.mean

    cached, plain = pair(Running())
    with Quiet():
        for _ in range(6):
            agree(cached, plain, X, times=1)


def test_self_check_does_not_disturb_state():
    """Running statistics end where the plain module's end: the extra run of the self-check leaves none behind."""

    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            self.mean.lerp_(x.mean(0), 0.5)
            return x * 2

    cached, plain = pair(Running())
    with Quiet():
        cached(X), plain(X)
    torch.testing.assert_close(cached.mean, plain.mean)


def test_batchnorm_in_training_mode():
    """Batch norm in training mode is bypassed and its statistics are the plain module's."""
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    module.train()
    plain = copy.deepcopy(module)
    with Quiet():
        cached = cached_module(module)
        agree(cached, plain, X, times=3)
    torch.testing.assert_close(cached[1].running_mean, plain[1].running_mean)
    assert int(cached[1].num_batches_tracked) == int(plain[1].num_batches_tracked)


def test_embedding_max_norm():
    """An embedding with max_norm rewrites its weights while it reads them: rows stay right."""
    module = nn.Embedding(10, 4, max_norm=0.5)
    cached, plain = pair(module)
    with Quiet():
        ids = torch.arange(10)
        for _ in range(4):
            agree(cached, plain, ids)


def test_random_modules():
    """A module that draws numbers, from torch, numpy or Python, is bypassed and warned about."""
    import random

    import numpy as np

    class Draws(nn.Module):
        def __init__(self, source):
            super().__init__()
            self.source = source

        def forward(self, x):
            noise = {
                "torch": lambda: torch.randn(len(x), 1),
                "numpy": lambda: torch.from_numpy(np.random.randn(len(x), 1)).float(),
                "python": lambda: torch.tensor([[random.random()] for _ in x]),
                "dropout": lambda: nn.functional.dropout(torch.ones(len(x), 64), 0.5).mean(1, keepdim=True),
            }[self.source]()
            return x + noise

    for source in ("torch", "numpy", "python", "dropout"):
        cached, _ = pair(Draws(source))
        with pytest.warns(CacheWarning):
            one = cached(X)
        assert not torch.equal(one, cached(X)), source
        assert not torch.equal(cached(X), cached(X)), source


def test_random_state_is_left_alone():
    """A cached call draws no more random numbers than the plain one, so a loop stays reproducible."""
    cached, plain = pair()
    torch.manual_seed(0)
    cached(X)
    one = torch.rand(1)
    torch.manual_seed(0)
    plain(X)
    assert torch.equal(one, torch.rand(1))


def test_state_dict_assign_with_other_dtype():
    """to(dtype) and half() change dtype of weights and of outputs."""
    cached, plain = pair()
    agree(cached, plain, X)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        cached.to(dtype), plain.to(dtype)
        agree(cached, plain, X.to(dtype), tolerance=5e-2)


def test_optimizer_loop_with_cached_and_trained_part():
    """Fine-tuning turns on after some frozen epochs: losses are those of the plain loop."""
    torch.manual_seed(0)
    cached, plain = pair()
    losses = {}
    for name, module in (("cached", cached), ("plain", plain)):
        torch.manual_seed(0)
        head = nn.Linear(3, 1)
        found = []
        with Quiet():
            for epoch in range(6):
                module.requires_grad_(epoch >= 3)
                parameters = [p for p in [*module.parameters(), *head.parameters()] if p.requires_grad]
                optimizer = torch.optim.SGD(parameters, 0.1)
                for _ in range(2):
                    loss = (head(module(X)) - 1).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    found.append(float(loss.detach()))
        losses[name] = found
    assert losses["cached"] == pytest.approx(losses["plain"], rel=1e-4)


def test_module_dies_and_memory_returns():
    """A dropped module is collected without the garbage collector, and its rows with it."""
    import weakref

    gc.collect()
    gc.disable()
    try:
        cached = cached_module(Encoder(), freeze=True)
        cached(X), cached(X)
        alive = weakref.ref(cached), weakref.ref(cache_of(cached).store), weakref.ref(cached.last.weight)
        del cached
        assert [ref() for ref in alive] == [None, None, None]
    finally:
        gc.enable()


def test_saved_and_loaded_weights_find_the_store_again():
    """Weights saved and loaded into a new module of one class have the same namespace."""
    torch.manual_seed(0)
    one = cached_module(Encoder(), freeze=True)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    other = cached_module(Encoder(), freeze=True)
    assert cache_of(other).namespace != cache_of(one).namespace
    other.load_state_dict(torch.load(buffer))
    assert cache_of(other).namespace == cache_of(one).namespace


def test_restless_weights():
    """Weights that are written again and again with what they are end in a bypass, said once, and stay right."""
    cached, plain = pair()
    state = copy.deepcopy(plain.state_dict())
    with pytest.warns(CacheWarning, match="again") as seen:
        for _ in range(8):
            cached.load_state_dict(state)
            agree(cached, plain, X, times=1)
    assert len([w for w in seen if issubclass(w.category, CacheWarning)]) == 1
    agree(cached, plain, X, times=4)
    assert bypassed(cached) > 0


def test_meta_and_freed_weights():
    """Weights that cannot be read are never touched: the module is run as it is, with its own error."""
    module = frozen(Encoder().to("meta"))
    cached = cached_module(module)
    with pytest.warns(CacheWarning, match="cannot be read"):
        out = cached(X.to("meta"))
    assert out.device.type == "meta"


def test_freed_storage():
    """A storage resized to zero (FSDP) is not read."""
    cached, plain = pair()
    agree(cached, plain, X)
    storage = cached.last.weight.untyped_storage()
    size = storage.nbytes()
    kept = cached.last.weight.detach().clone()
    storage.resize_(0)
    with Quiet(), contextlib.suppress(RuntimeError):
        cached(X)
    storage.resize_(size)
    cached.last.weight.data.copy_(kept)
    agree(cached, plain, X)


def test_version_is_added():
    """version= makes another namespace, and does not hide a change of weights that can be read."""
    base = frozen(Encoder())
    store = MemoryStore(1 << 20)
    names = {
        cache_of(cached_module(copy.deepcopy(base), store=store, version=version)).namespace
        for version in (None, "1", "2")
    }
    assert len(names) == 3
    cached, plain = pair(version="v1")
    agree(cached, plain, X)
    by_data_dense(cached), by_data_dense(plain)
    agree(cached, plain, X)


VIEWS = {
    "transposed": lambda data: data.t(),
    "fewer rows": lambda data: data[:2],
    "stretched": lambda data: data[:1].expand(4, 4),
    "strided": lambda data: data.as_strided((4, 4), (0, 1)),
    "negated": torch._neg_view,
}


@pytest.mark.parametrize("layers", [1, 80])
@pytest.mark.parametrize("how", VIEWS)
def test_another_view_of_the_same_memory(how, layers):
    """``p.data = p.data.t()`` moves neither pointer nor counter nor value; of many tensors it is noticed in turn."""
    module, plain = pair(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(layers))))
    agree(module, plain, X[:, :4])
    for own in (module, plain):
        own[-1].weight.data = VIEWS[how](own[-1].weight.data)
    if layers > 64:
        with Quiet():
            for _ in range(16):
                module(X[:, :4])
    agree(module, plain, X[:, :4])


def test_the_fast_path_of_attention_counts():
    """Without it, an encoder of torch gives other values at padded positions."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    module, plain = pair(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    tokens, padding = torch.randn(4, 5, 8), torch.arange(5).repeat(4, 1) >= torch.tensor([[5], [3], [2], [4]])
    try:
        with Quiet(), torch.no_grad():
            for enabled in (True, False, True):
                torch.backends.mha.set_fastpath_enabled(enabled)
                agree(module, plain, tokens, src_key_padding_mask=padding)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_training_flag_of_a_layer_that_a_forward_reads():
    """Layers that do the same in both modes do not count in them, but code of the user's own may ask for the flag."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x) * (3 if self.layer.training else 2)

    cached, plain = pair(Reads())
    for training in (False, True, False, True):
        cached.layer.train(training)
        plain.layer.train(training)
        agree(cached, plain, X)
    assert bypassed(cached) == 0
