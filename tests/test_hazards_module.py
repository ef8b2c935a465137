"""A cached module is still the user's module: for torch, for transformers, and for whoever looks at it."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import types
import weakref

import pytest
import torch
from torch import nn

import modcache
from modcache import CacheWarning, cache_of, cached_module, is_cached, uncached
from tests.hazards import Encoder, Quiet, agree, assert_same, computed, frozen, hits, pair

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Typed(nn.Module):
    """A documented module."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.layer = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, flag: bool = False) -> torch.Tensor:
        """Documented forward."""
        return self.layer(x) * scale


@cached_module
class Bare(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, 3)

    def forward(self, x):
        return self.layer(x)


@cached_module(key="tensor", freeze=True)
class Options(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.layer(x))


# --- looks ----------------------------------------------------------------------------------------------


def test_looks_like_the_class_of_before():
    """isinstance, names, documentation, signature, repr and state are those of the plain module."""
    plain = frozen(Typed())
    cached = cached_module(copy.deepcopy(plain))
    assert isinstance(cached, Typed)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(cached), name) == getattr(Typed, name)
    assert inspect.signature(cached.forward) == inspect.signature(plain.forward)
    assert inspect.signature(type(cached).__init__) == inspect.signature(Typed.__init__)
    assert cached.forward.__doc__ == plain.forward.__doc__
    assert repr(cached) == repr(plain)
    assert list(cached.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in cached.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in cached.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in cached.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert str(cached.extra_repr()) == str(plain.extra_repr())
    assert inspect.getsource(cached.forward) == inspect.getsource(plain.forward)


def test_wrapping_returns_the_same_object():
    """The instance is converted in place and returned."""
    module = frozen(Typed())
    assert cached_module(module) is module
    assert is_cached(module)
    assert uncached(module) is module
    assert not is_cached(module)
    assert type(module) is Typed
    assert "forward" not in vars(module)
    assert not [name for name in vars(module) if "modcache" in name]


def test_wrapping_again():
    """Again without options changes nothing, with other options is an error; the verbs refuse plain modules."""
    cached = cached_module(frozen(Typed()), key="tensor")
    cls = type(cached)
    assert cached_module(cached) is cached
    assert cached_module(cached, key="tensor") is cached
    assert type(cached) is cls
    with pytest.raises(ValueError, match="uncached"):
        cached_module(cached, key="text")
    with pytest.raises(ValueError):
        cached_module(cached, freeze=True)
    for verb in (uncached, cache_of):
        with pytest.raises(ValueError):
            verb(Typed())
        with pytest.raises(TypeError):
            verb(3)
    assert not is_cached(Typed())


@pytest.mark.parametrize(
    "options",
    [{"key": "nothing"}, {"verify": 2.0}, {"verify": "x"}, {"store": 3}, {"prepare": 3}, {"version": 3}, {"freeze": 1},
     {"per_row": None}, {"broadcast": 3}, {"broadcast": [3]}, {"key": 3}, {"nothing": 1}],
    ids=str,
)  # fmt: skip
def test_wrong_options(options):
    """A wrong option raises a TypeError or ValueError and leaves the module as it was."""
    module = frozen(Typed())
    with pytest.raises((TypeError, ValueError)):
        cached_module(module, **options)
    assert type(module) is Typed
    for thing in (3, "x", lambda x: x, object(), int):
        with pytest.raises(TypeError):
            cached_module(thing)


def test_script_modules_are_refused():
    """A ScriptModule is refused with a TypeError."""
    with pytest.raises(TypeError, match="ScriptModule"):
        cached_module(torch.jit.script(frozen(nn.Linear(4, 3))))
    with pytest.raises(TypeError):
        cached_module(torch.jit.trace(frozen(nn.Linear(4, 3)), X))


def test_freeze_and_what_uncached_restores():
    """freeze switches gradients and training mode off; uncached restores each flag, also in a copy."""
    module = Encoder()
    module.drop.eval()
    module.first.weight.requires_grad_(False)
    flags = [p.requires_grad for p in module.parameters()], [m.training for m in module.modules()]
    cached_module(module, freeze=True)
    assert not any(p.requires_grad for p in module.parameters())
    assert not any(m.training for m in module.modules())
    copied = copy.deepcopy(module)
    pickled = pickle.loads(pickle.dumps(module))
    for other in (module, copied, pickled):
        uncached(other)
        assert ([p.requires_grad for p in other.parameters()], [m.training for m in other.modules()]) == flags
        other.train()
        assert other.training


def test_warned_when_wrapped_unless_frozen():
    """A module that would never be cached in training is warned about when it is wrapped, at the user's line."""
    with pytest.warns(CacheWarning, match="trainable") as seen:
        cached_module(Encoder())
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with pytest.warns(CacheWarning, match="training mode"):
        cached_module(Encoder().requires_grad_(False))


# --- copies ---------------------------------------------------------------------------------------------


def test_deepcopy():
    """A deepcopy has an identity of its own and shares the store: it hits, and changes apart from the original."""
    cached, plain = pair()
    agree(cached, plain, X)
    copied = copy.deepcopy(cached)
    assert is_cached(copied)
    assert type(copied) is type(cached)
    assert cache_of(copied).store is cache_of(cached).store
    agree(copied, plain, X)
    assert computed(copied) == 0
    copied.last.weight.data.mul_(2)
    changed = uncached(copy.deepcopy(copied))
    agree(copied, changed, X)
    agree(cached, plain, X)
    assert hits(copied) > 0


def test_copy_copy():
    """A shallow copy answers rightly as well."""
    cached, plain = pair()
    agree(cached, plain, X)
    other = copy.copy(cached)
    agree(other, plain, X)
    other.scale = 3.0
    plain.scale = 3.0
    agree(other, plain, X)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickle(how):
    """A pickle holds no rows, stays wrapped with its options, and answers rightly."""
    cached, plain = pair()
    big = torch.randn(500, 4)
    empty = len(dump(cached, how))
    cached(big), cached(big)
    blob = dump(cached, how)
    assert len(blob) < empty + 1000
    other = load(blob, how)
    assert is_cached(other)
    assert isinstance(other, Encoder)
    agree(other, plain, X)
    assert cache_of(other).stats.hits == 6
    assert cache_of(other).store.stats().rows == 6


class Counting(Encoder):
    """Counts its calls in an attribute and in a buffer, and fills a table at its first call."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.table = {}
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.table.setdefault("twice", self.last.weight.sum() * 0)
        return super().forward(x) + self.table["twice"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
def test_copies_know_what_a_forward_changes(how, tmp_path):
    """A counter that has counted makes no other module of a copy: it is served what the original stored."""
    cached = cached_module(frozen(Counting()), store=str(tmp_path))
    plain = copy.deepcopy(uncached(copy.deepcopy(cached)))
    for _ in range(3):
        agree(cached, plain, X)
    cache_of(cached).flush()
    for other in (copied := duplicate(cached, how), duplicate(copied, how)):
        agree(other, plain, X)
        assert computed(other) == 0
        assert cache_of(other).namespace == cache_of(cached).namespace
        other.last.weight.data.mul_(2)
        agree(other, copy.deepcopy(uncached(duplicate(other, how))), X)


def duplicate(module, how):
    return copy.deepcopy(module) if how == "deepcopy" else load(dump(module, how), how)


def dump(module, how):
    buffer = io.BytesIO()
    pickle.dump(module, buffer) if how == "pickle" else torch.save(module, buffer)
    return buffer.getvalue()


def load(blob, how):
    buffer = io.BytesIO(blob)
    return pickle.load(buffer) if how == "pickle" else torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("cls", [Bare, Options])
def test_decorated_classes(cls):
    """Instances of a decorated class are cached, pickle, copy, and load each other's state."""
    with Quiet():
        module, fresh = frozen(cls()), cls(4)
    assert is_cached(cls)
    assert is_cached(module)
    assert isinstance(module, cls)
    assert cls.__name__ in ("Bare", "Options")
    assert cls.__module__ == __name__
    x = module(X)
    assert torch.equal(module(X), x)
    assert hits(module) == 6
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(other) is cls
        torch.testing.assert_close(other(X), x)
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(frozen(fresh)(X), x)
    assert inspect.signature(cls) == inspect.signature(uncached(cls))


def test_decorated_instances_do_not_share_namespaces():
    """Each instance of a decorated class has a namespace of its own content."""
    a, b = Options(), Options()
    assert not torch.equal(a(X), b(X))
    assert cache_of(a).namespace != cache_of(b).namespace


def test_subclass_of_a_decorated_class():
    """A subclass of a decorated class is cached as a whole, with its own forward and __init__."""

    class Sub(Options):
        def __init__(self):
            super().__init__(4)
            self.gain = 2.0

        def forward(self, x):
            return super().forward(x) * self.gain

    module = Sub()
    assert not any(p.requires_grad for p in module.parameters())
    plain = functools.partial(lambda m, x: m.layer(x) * m.gain, module)
    for _ in range(3):
        assert_same(module(X), plain(X))
    module.gain = 5.0
    for _ in range(2):
        assert_same(module(X), plain(X))
    assert hits(module) > 0
    copied = copy.deepcopy(module)
    assert_same(copied(X), plain(X))


def test_subclass_that_does_not_call_forward_of_the_base():
    """A subclass that replaces forward altogether gives what its forward gives."""

    class Sub(Bare):
        def forward(self, x):
            return self.layer(x) + 100

    with Quiet():
        module = frozen(Sub())
        for _ in range(3):
            assert_same(module(X), module.layer(X) + 100)


def test_state_dict_round_trip_and_strict():
    """state_dict loads into a plain module with strict=True, and back."""
    cached, plain = pair()
    with torch.no_grad():
        plain.load_state_dict(cached.state_dict(), strict=True)
        other = frozen(Encoder())
        cached.load_state_dict(other.state_dict(), strict=True)
    agree(cached, other, X)


def test_hooks_of_the_root_run_on_every_call():
    """Hooks of the wrapped module run on misses and hits, those inside for computed rows only, and not in the check."""
    cached, _ = pair()
    root, pre, _inside = [], [], []
    cached.register_forward_hook(lambda m, a, out: root.append(len(out)))
    cached.register_forward_pre_hook(lambda m, a: pre.append(len(a[0])))
    with Quiet():
        for _ in range(4):
            cached(X)
    assert root == [6] * 4
    assert pre == [6] * 4
    assert hits(cached) == 18, "what a hook gathers is no part of the module"


def test_hook_that_changes_inputs_or_outputs():
    """A root hook that changes what goes in or out does so on every call, once."""
    cached, plain = pair()
    for m in (cached, plain):
        m.register_forward_hook(lambda m, a, out: out + 1)
        m.register_forward_pre_hook(lambda m, a, kw: ((a[0] * 2,), kw), with_kwargs=True)
    agree(cached, plain, X, times=4)
    assert hits(cached) > 0


def test_backward_hooks():
    """A full backward hook on the root does no harm."""
    cached, plain = pair()
    cached.register_full_backward_hook(lambda m, gi, go: None)
    agree(cached, plain, X, times=3)
    head = nn.Linear(3, 1)
    head(cached(X)).sum().backward()


def test_capturing_hook_inside():
    """A hook on a child that collects activations sees the computed rows, or the module is not cached."""
    cached, plain = pair()
    seen = []
    cached.norm.register_forward_hook(lambda m, a, out: seen.append(out))
    with Quiet():
        agree(cached, plain, X, times=3)
    assert seen


# --- moves ----------------------------------------------------------------------------------------------


def test_to_half_double_and_meta():
    """to(), half(), double(), bfloat16() and to_empty() work as on the plain module."""
    cached, plain = pair()
    agree(cached, plain, X)
    for move in (lambda m: m.double(), lambda m: m.to(torch.float32), lambda m: m.bfloat16(), lambda m: m.float()):
        move(cached), move(plain)
        agree(cached, plain, X.to(plain.last.weight.dtype), tolerance=5e-2)
    cached.to("meta")
    cached.to_empty(device="cpu")
    cached.load_state_dict(plain.state_dict())
    agree(cached, plain, X)


def test_apply_share_memory_zero_grad_requires_grad():
    """Methods of nn.Module work and are noticed where they change weights."""
    cached, plain = pair()
    agree(cached, plain, X)
    for m in (cached, plain):
        m.apply(lambda c: nn.init.constant_(c.weight, 0.5) if isinstance(c, nn.Linear) else None)
    agree(cached, plain, X)
    cached.share_memory()
    agree(cached, plain, X)
    cached.zero_grad()
    assert cached.requires_grad_(False) is cached
    assert cached.get_submodule("norm") is cached.norm


def test_instance_patched_forward():
    """A forward that accelerate patched onto the instance is moved inside, run, and restored by uncached."""
    module = frozen(Typed())
    old = module.forward
    seen = []

    @functools.wraps(old)
    def new_forward(*args, **kwargs):
        seen.append(1)
        return old(*args, **kwargs) * 2

    module.forward = new_forward
    expected = module(X)
    cached = cached_module(module)
    seen.clear()
    for _ in range(3):
        assert_same(cached(X), expected)
        assert_same(cached(x=X), expected)
    assert len(seen) <= 2
    assert "forward" not in vars(cached)
    assert uncached(cached).forward is new_forward


def test_forward_patched_after_wrapping():
    """A forward patched onto a cached instance runs; uncached refuses until it is taken away."""
    cached, plain = pair(Typed())
    agree(cached, plain, X)
    for m in (cached, plain):
        inner = m.forward
        m.forward = lambda *a, inner=inner, **k: inner(*a, **k) * 2
    with Quiet():
        agree(cached, plain, X)
    with pytest.raises(RuntimeError, match="forward"):
        uncached(cached)
    del cached.forward
    uncached(cached)


def test_layered_parametrization():
    """A parametrization on the cached module itself works, and uncached names what is in the way."""
    from torch.nn.utils import parametrizations, parametrize

    module = frozen(nn.Linear(4, 3))
    plain = copy.deepcopy(module)
    cached = cached_module(module)
    agree(cached, plain, X)
    for m in (cached, plain):
        parametrizations.weight_norm(m)
        m.requires_grad_(False)
    with Quiet():
        agree(cached, plain, X)
        cached.parametrizations.weight.original0.data.mul_(2)
        plain.parametrizations.weight.original0.data.mul_(2)
        agree(cached, plain, X)
    with pytest.raises(RuntimeError):
        uncached(cached)
    parametrize.remove_parametrizations(cached, "weight")
    assert type(uncached(cached)) is nn.Linear


def test_parametrized_before_wrapping():
    """A parametrized module can be wrapped and unwrapped."""
    from torch.nn.utils import parametrizations

    module = frozen(parametrizations.orthogonal(nn.Linear(4, 4)))
    plain = copy.deepcopy(module)
    cls = type(module)
    cached = cached_module(module)
    with Quiet():
        agree(cached, plain, X)
    assert type(uncached(cached)) is cls


def test_lazy_modules():
    """Lazy modules materialise under the cache and are cached afterwards."""
    torch.manual_seed(0)
    cached = cached_module(nn.LazyLinear(3), freeze=True)
    with Quiet():
        cached(X)
        for _ in range(3):
            assert_same(cached(X), nn.functional.linear(X, cached.weight, cached.bias))
    assert isinstance(cached, nn.Linear)
    nested = cached_module(nn.Sequential(nn.LazyLinear(3), nn.ReLU()), freeze=True)
    with Quiet():
        for _ in range(3):
            assert_same(nested(X), nn.functional.linear(X, nested[0].weight, nested[0].bias).relu())


def test_weakref_and_attributes():
    """Weak references, attributes and deletion work."""
    cached, _ = pair()
    assert weakref.ref(cached)() is cached
    cached.note = "x"
    assert cached.note == "x"
    del cached.note
    with pytest.raises(AttributeError):
        _ = cached.note


def test_modules_with_own_getattr_and_slots():
    """A module with its own __getattr__, __call__ or properties works."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def __getattr__(self, name):
            if name == "virtual":
                return 7
            return super().__getattr__(name)

        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) + 1

        @property
        def doubled(self):
            return 2

        def forward(self, x):
            return self.layer(x) * self.virtual * self.doubled

    cached, plain = pair(Odd())
    agree(cached, plain, X, times=3)
    assert hits(cached) > 0


def test_forward_that_calls_itself_and_other_entry_points():
    """Recursion through self(...) and other methods are the plain module's."""

    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def encode(self, x):
            return self.layer(x)

        def forward(self, x, depth=2):
            return self.layer(x) if depth == 0 else self(self.layer(x), depth - 1)

    cached, plain = pair(Recursive())
    agree(cached, plain, X, times=3)
    agree(cached, plain, X, depth=1)
    assert_same(cached.encode(X), plain.encode(X))


def test_static_and_partial_forwards():
    """A forward that is a partialmethod or decorated (no_grad, inference_mode) is cached."""

    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        @torch.inference_mode()
        def forward(self, x):
            return self.layer(x)

    class NoGrad(Decorated):
        @torch.no_grad()
        def forward(self, x):
            return self.layer(x)

    for cls in (Decorated, NoGrad):
        cached, plain = pair(cls())
        agree(cached, plain, X, times=3)
        head = nn.Linear(3, 1)
        head(cached(X)).sum().backward()


# --- torch's machinery ----------------------------------------------------------------------------------


def test_jit_trace_and_make_fx_and_fake_tensors():
    """Tracing a parent records the module's operations, not a look-up."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    cached, plain = pair()
    agree(cached, plain, X)
    parent = nn.Sequential(cached, nn.Tanh()).eval()
    traced = torch.jit.trace(parent, X, check_trace=False)
    y = torch.randn(3, 4)
    assert_same(traced(y), plain(y).tanh())
    graph = make_fx(cached)(X)
    assert_same(graph(y), plain(y))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        out = cached(fake.from_tensor(X))
        assert out.shape == (6, 3)
    agree(cached, plain, X)


def test_export():
    """torch.export sees the plain forward."""
    cached, plain = pair(Typed())
    agree(cached, plain, X)
    program = torch.export.export(cached, (X,))
    y = torch.randn(6, 4)
    assert_same(program.module()(y), plain(y))


def test_functional_transforms():
    """functional_call, vmap, grad and jvp give what the plain module gives."""
    from torch.func import functional_call, grad, jvp, vmap

    cached, plain = pair(Typed())
    agree(cached, plain, X)
    other = {name: value * 2 for name, value in plain.state_dict().items()}
    assert_same(functional_call(cached, other, (X,)), functional_call(plain, other, (X,)))
    agree(cached, plain, X)
    assert_same(vmap(cached)(X), vmap(plain)(X))
    loss = lambda m: lambda x: m(x).square().sum()
    assert_same(grad(loss(cached))(X), grad(loss(plain))(X))
    assert_same(jvp(cached, (X,), (X,)), jvp(plain, (X,), (X,)))
    stacked = {name: torch.stack([value, value * 2]) for name, value in plain.state_dict().items()}
    call = lambda m: lambda s: functional_call(m, s, (X,))
    assert_same(vmap(call(cached))(stacked), vmap(call(plain))(stacked))
    agree(cached, plain, X)


def test_forward_mode_differentiation():
    """The tangent of an input goes through the module, also for rows that are stored."""
    from torch.autograd import forward_ad

    cached, plain = pair(Typed())
    agree(cached, plain, X)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        found, expected = (forward_ad.unpack_dual(module(dual)) for module in (cached, plain))
        assert_same(found.primal, expected.primal)
        assert_same(found.tangent, expected.tangent)
    agree(cached, plain, X)


def test_function_modes():
    """Inside of a mode that does something else in place of torch's functions nothing is served, nor stored."""

    class Doubles(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            return found * 2 if function is torch.nn.functional.linear else found

    cached, plain = pair(Typed())
    agree(cached, plain, X)
    for batch in (X, X + 1):
        with Doubles():
            agree(cached, plain, batch)
        agree(cached, plain, batch)
    before = hits(cached)
    with torch.device("cpu"):  # a function mode as well, which says where new tensors lie
        agree(cached, plain, X)
    assert hits(cached) == before + 2 * len(X)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    """A cached module inside a checkpointed part, with something trained before and after it."""
    from torch.utils.checkpoint import checkpoint

    cached, plain = pair(Typed())
    torch.manual_seed(0)
    head = nn.Linear(3, 1)
    grads = []
    for module in (plain, cached, cached):
        head.zero_grad()
        x = X.clone().requires_grad_(reentrant)
        out = checkpoint(lambda x, m=module: head(m(x.detach())), x, use_reentrant=reentrant)
        out.sum().backward()
        grads.append(head.weight.grad.clone())
    assert_same(grads[1], grads[0])
    assert_same(grads[2], grads[0])


def test_checkpoint_with_gradient_through_the_module():
    """A checkpoint through the cached module itself passes gradients on."""
    from torch.utils.checkpoint import checkpoint

    cached, plain = pair(Typed())
    grads = []
    with Quiet():
        for module in (plain, cached):
            x = X.clone().requires_grad_()
            checkpoint(module, x, use_reentrant=False).sum().backward()
            grads.append(x.grad)
    assert_same(grads[1], grads[0])


def test_ddp_with_buffers():
    """Inside DDP (gloo, one process), whose buffers are sent at each step, rows keep hitting and stay right."""
    import torch.distributed as dist

    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    cached, plain = pair(module)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Sequential(cached, nn.Linear(3, 1))
        ddp = nn.parallel.DistributedDataParallel(model)
        cached.eval()
        for _ in range(6):
            with Quiet():
                ddp(X).sum().backward()
            assert_same(cached(X), plain(X))
        assert hits(cached) > 20
    finally:
        dist.destroy_process_group()


def test_data_parallel_replica():
    """A replica as DataParallel makes it runs uncached."""
    cached, plain = pair(Typed())
    agree(cached, plain, X)
    replica = cached._replicate_for_data_parallel()
    replica._parameters = cached._parameters.copy()
    with Quiet():
        assert_same(replica(X), plain(X))


def test_compile_of_a_parent():
    """torch.compile of a parent: a clean graph break, and cached."""
    cached, plain = pair(Typed())
    head = nn.Linear(3, 1).requires_grad_(False)
    parent = torch.compile(nn.Sequential(cached, head), backend="eager")
    for x in (X, X, X[:3], X + 1, X):
        assert_same(parent(x), head(plain(x)))
    assert hits(cached) >= 6
    cached.layer.weight.data.mul_(2), plain.layer.weight.data.mul_(2)
    assert_same(parent(X), head(plain(X)))


def test_compile_of_the_module():
    """torch.compile of a cached module, and caching of a compiled one."""
    cached, plain = pair(Typed())
    compiled = torch.compile(cached, backend="eager")
    for _ in range(3):
        assert_same(compiled(X), plain(X))
    assert hits(cached) >= 6
    with modcache.mode("off"):
        assert_same(compiled(X + 1), plain(X + 1))
    inner = frozen(Typed())
    expected = copy.deepcopy(inner)
    inner.compile(backend="eager")
    with Quiet():
        wrapped = cached_module(inner)
        for _ in range(3):
            assert_same(wrapped(X), expected(X))
    outer = cached_module(torch.compile(frozen(Typed()), backend="eager"))
    with Quiet():
        first = outer(X)
        assert_same(outer(X), first)


def test_save_pretrained_and_from_pretrained(tmp_path):
    """save_pretrained writes what the plain model writes, and from_pretrained reads it."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()  # its monitor thread would stay
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = frozen(transformers.BertModel(config))
    plain = copy.deepcopy(model)
    cached = cached_module(model)
    ids = torch.randint(0, 50, (3, 5))
    with Quiet():
        expected = plain(ids).last_hidden_state
        assert_same(cached(ids).last_hidden_state, expected)
    cached.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is transformers.BertModel
    assert_same(loaded(ids).last_hidden_state, expected)
    import json

    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
    (tmp_path / "moved").mkdir()
    cached.save_pretrained(tmp_path / "moved")
    names = {
        cache_of(cached_module(transformers.BertModel.from_pretrained(folder), freeze=True)).namespace
        for folder in (tmp_path, tmp_path / "moved")
    }
    assert len(names) == 1


def test_method_binding_and_super():
    """Zero-argument super() in the user's class works through the cached class."""

    class Base(nn.Module):
        def forward(self, x):
            return x * 2

        def train(self, mode=True):
            self.trained = mode
            return super().train(mode)

    class Derived(Base):
        def forward(self, x):
            return super().forward(x) + 1

    cached, plain = pair(Derived())
    agree(cached, plain, X, times=3)
    cached.train(False)
    assert cached.trained is False


def test_metaclass_and_slots_and_generic():
    """Classes with a metaclass of their own, or generic ones, can be wrapped."""
    import abc
    from typing import Generic, TypeVar

    T = TypeVar("T")

    class Meta(nn.Module, abc.ABC):
        @abc.abstractmethod
        def forward(self, x): ...

    class Real(Meta):
        def forward(self, x):
            return x * 2

    class Gen(nn.Module, Generic[T]):
        def forward(self, x):
            return x * 3

    for cls in (Real, Gen):
        cached, plain = pair(cls())
        agree(cached, plain, X)


def test_module_shared_by_two_parents():
    """One cached module in two parents is one cache."""
    cached, _plain = pair()
    a, b = nn.Sequential(cached), nn.Sequential(cached, nn.Identity())
    a(X)
    b(X)
    assert computed(cached) == 6
    assert hits(cached) == 6


def test_uncached_forgets_nothing_of_the_users():
    """After uncached the module trains as before."""
    module = Encoder()
    cached_module(module, freeze=True)(X)
    uncached(module)
    module(X).sum().backward()
    assert module.last.weight.grad is not None


def test_types_of_kept_things():
    """Nothing that cannot be pickled hangs on the module: no lock, no thread, no weak dictionary."""
    cached, _ = pair()
    cached(X)
    assert isinstance(vars(cached), dict)
    assert not any(isinstance(value, types.GeneratorType) for value in vars(cached).values())


def test_saving_a_checkpoint_leaves_the_rows_alone(tmp_path):
    """``save_pretrained`` writes into the configuration of the model in memory: parts that share it still hit."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()  # its monitor thread would stay
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(intermediate_size=8, **sizes)).save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    cached_module(model.bert, freeze=True, store=tmp_path / "cache")
    ids = torch.randint(1, 20, (6, 5))
    model(ids)
    for _ in range(6):
        model.save_pretrained(tmp_path / "checkpoint")
        model(ids)
    assert model.config.architectures == ["BertForSequenceClassification"]
    assert (cache_of(model.bert).stats.computed, cache_of(model.bert).stats.hits) == (6, 36)
    cache_of(model.bert).close()
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint")
    cached_module(again.bert, freeze=True, store=tmp_path / "cache")
    again(ids)
    assert cache_of(again.bert).stats.hits == 6


class InOrder(nn.Module):
    """Goes through its children, parameters and buffers in their order."""

    def __init__(self, names="ab"):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Tanh() if name == "a" else nn.Hardshrink() for name in names})
        for number, name in enumerate("ab"):
            self.register_parameter(f"p{name}", nn.Parameter(torch.full((3,), 2.0 + number)))
            self.register_buffer(f"b{name}", torch.full((3,), 4.0 + number))

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x) + 0.1
        for tensor in (*self.parameters(), *self.buffers()):
            x = x * tensor + 1
        return x


class ReadsItself(nn.ModuleDict):
    def forward(self, x):
        for layer in self.values():
            x = layer(x) + 0.1
        return x


def _last(names):
    first = next(iter(names))
    names[first] = names.pop(first)


REORDERED = {
    "children": (InOrder, lambda module: _last(module.layers)),
    "parameters": (InOrder, lambda module: _last(module._parameters)),
    "buffers": (InOrder, lambda module: _last(module._buffers)),
    "own children": (lambda: ReadsItself({"a": nn.Tanh(), "b": nn.Hardshrink()}), _last),
}


@pytest.mark.parametrize("name", REORDERED)
def test_order_within_a_module_counts(name):
    """What a forward may go through, in another order is another module, though every name has the same under it."""
    make, reorder = REORDERED[name]
    cached, plain = pair(make())
    x = torch.randn(5, 3)
    agree(cached, plain, x)
    one = cache_of(cached).namespace
    reorder(cached)
    reorder(plain)
    agree(cached, plain, x)
    assert hits(cached) == 10
    assert cache_of(cached).namespace != one
    assert cache_of(frozen(cached)).namespace == cache_of(pair(plain)[0]).namespace


def moved_on(x):
    return x * 2


def edited(x):
    return x * 3


class Calls(nn.Module):
    """Calls a function of the same file."""

    def forward(self, x):
        return moved_on(x)


def test_code_that_is_put_into_an_old_function_is_seen_at_once(monkeypatch):
    """Reloaders of notebooks put new code into the old functions: the very next call computes with it."""
    batch = torch.arange(8.0).reshape(4, 2)
    cached = cached_module(Calls(), freeze=True)
    assert torch.equal(cached(batch), batch * 2)
    monkeypatch.setattr(moved_on, "__code__", edited.__code__)
    assert torch.equal(cached(batch), batch * 3)
    monkeypatch.undo()
    assert torch.equal(cached(batch), batch * 2)
    assert (cache_of(cached).stats.computed, cache_of(cached).stats.hits) == (8, 4)
