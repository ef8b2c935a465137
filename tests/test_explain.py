"""A miss is explained by what differs from the nearest thing stored."""

import time

import pytest
import torch
from torch import nn

from modcache import CacheMissError, CacheWarning, UsageTypeError, cache_of, cached_module, mode, register_key_extractor
from modcache import explain as module
from modcache.explain import Explanation, Recent, differing_parts
from modcache.keys import registry

from .models import Scaled, TokenEncoder, encoder

X = torch.arange(12.0).reshape(4, 3)


def reasons(cached, *args, **kwargs):
    return [explanation.reason for explanation in cache_of(cached).explain(*args, **kwargs)]


def test_hits_and_misses():
    """Each row of a call is a hit or a miss, as the call would find it."""
    cached = cached_module(encoder(), freeze=True)
    assert reasons(cached, X) == ["nothing was stored by this module yet"] * 4
    cached(X[:2])
    found = cache_of(cached).explain(X)
    assert [(explanation.row, explanation.hit) for explanation in found] == [
        (0, True),
        (1, True),
        (2, False),
        (3, False),
    ]
    assert [explanation.hit for explanation in found] == cache_of(cached).contains(X)
    assert str(found[0]) == "row 0: hit, stored in this namespace"
    assert str(found[3]).startswith("row 3: miss, not seen before")


def test_asking_runs_nothing():
    """The module is not run, and nothing is counted."""
    cached = cached_module(encoder(), freeze=True)
    reasons(cached, X)
    assert cached.calls == 0
    assert cache_of(cached).stats.calls == 0


FORMS = {
    "dtype": (
        (X.double(),),
        "has this form: x tensor torch.float64 .*the nearest has x tensor torch.float32",
    ),
    "shape": ((X[:, :2],), r"nothing stored has this form: x tensor torch.float32 \(2,\)"),
    "shared": ((X, 3.0), "an argument that all rows share differs from the nearest stored row: scale"),
    "more shared": ((X, 2.0, torch.tensor(1.0)), "differs from the nearest stored row: offset"),
    "rows": ((X + 1, 2.0), "not seen before; differs from the nearest stored row in x"),
}


@pytest.mark.parametrize("kind", FORMS)
def test_what_differs_is_named(kind):
    """Form, shared arguments and rows are told apart, by the name of the argument."""
    cached = cached_module(Scaled(), freeze=True)
    cached(X, 2.0)
    args, message = FORMS[kind]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(reasons(cached, *args)[0])


def test_an_argument_that_is_no_longer_there():
    """A shared argument that was left out is named."""
    cached = cached_module(Scaled(), freeze=True)
    cached(X, 2.0, torch.tensor(1.0))
    assert reasons(cached, X, 2.0)[0].endswith("differs from the nearest stored row: offset")


def test_the_call_that_is_most_alike():
    """A row is compared with those of calls with the same arguments, whatever was stored after them."""
    cached = cached_module(Scaled(), freeze=True)
    cached(X, 2.0)
    cached(X, 2.0, torch.tensor(1.0))
    cached(X, 2.0, X)
    assert reasons(cached, X + 1, 2.0)[0] == "not seen before; differs from the nearest stored row in x"


def test_the_argument_of_several():
    """With several per-row arguments, the one that differs is named."""
    cached = cached_module(Scaled(), freeze=True)
    cached(X, 2.0, X)
    assert reasons(cached, X, 2.0, X + 1)[0] == "not seen before; differs from the nearest stored row in offset"
    assert reasons(cached, X + 1, 2.0, X + 1)[0] == "not seen before; differs from the nearest stored row in x, offset"


def test_large_rows_are_not_digested_again(monkeypatch):
    """Rows that are too large to be looked at part by part are explained without, beside small ones."""
    cached = cached_module(Scaled(), freeze=True)
    cached(X, 2.0, X)
    monkeypatch.setattr(module, "_REMEMBERED_BYTES", 10)
    assert reasons(cached, X, 2.0, X + 1) == ["not seen before"] * 4
    cached(X + 2, 2.0, X)
    monkeypatch.undo()
    assert len(reasons(cached, X + 5, 2.0, X + 1)) == 4


def test_containers_that_differ():
    """Equal rows in another structure are a miss that says so."""
    cached = cached_module(Reading(), freeze=True)
    cached({"a": X})
    assert reasons(cached, Box(a=X))[0].startswith("not seen before; differs from the nearest stored row in ")


class Reading(torch.nn.Module):
    """Reads one tensor out of a mapping."""

    def forward(self, batch):
        return 2 * batch["a"]


class Box(dict):
    """Another mapping."""


def test_another_state_is_named():
    """After an edit of the weights, a known input is explained by the part of the module that changed."""
    cached = cached_module(encoder(), freeze=True)
    cached(X)
    cache_of(cached).namespace  # noqa: B018 - digested before the edit, so that there is something to compare
    with torch.no_grad():
        cached.layer.bias.add_(1)
    found = reasons(cached, X)[0]
    assert found.startswith("its input is known, but under another state or context: ")
    assert "layer.bias" in found


def test_another_context_is_named():
    """Autocast is another context."""
    cached = cached_module(encoder(), freeze=True)
    cached(X)
    with torch.autocast("cpu", torch.bfloat16):
        found = reasons(cached, X)[0]
    assert found.startswith("its input is known, but under another state or context: ")
    assert "autocast" in found


def test_what_was_dropped():
    """A row that was stored and is gone is told apart from one that never was."""
    cached = cached_module(encoder(), freeze=True)
    cached(X)
    cache_of(cached).forget(X[:1])
    assert reasons(cached, X)[0] == "it was stored and is no longer held (evicted, cleared, or refused by a full store)"


def test_calls_that_are_bypassed():
    """A call that would not be cached says why, as does one whose keys cannot be made."""
    cached = cached_module(encoder(), freeze=True)
    assert reasons(cached, torch.zeros(0, 3)) == []
    assert reasons(cached, torch.tensor(1.0))[0].startswith("the call is bypassed (no rows): no argument has rows")


def test_after_calls_that_were_bypassed():
    """Where nothing was stored, the reasons for which calls were bypassed are named."""
    cached = cached_module(encoder(), freeze=True)
    with pytest.warns(CacheWarning, match="needs grad"):
        cached(X.clone().requires_grad_())
    assert reasons(cached, X)[0] == ("nothing was stored by this module yet; calls were bypassed: an input needs grad")


def test_asking_before_the_first_call(tmp_path):
    """What an earlier run found out about such calls is known to who asks first."""
    cached = cached_module(encoder(), freeze=True, store=tmp_path)
    cached(X)
    cache_of(cached).close()
    fresh = cached_module(encoder(), freeze=True, store=tmp_path)
    assert reasons(fresh, X) == ["stored in this namespace"] * 4
    fresh(X)
    assert cache_of(fresh).stats.computed == 0
    cache_of(fresh).close()


def test_tokens_and_given_keys():
    """Rows with keys of other kinds are explained, too."""
    cached = cached_module(TokenEncoder(), freeze=True, key="tokens")
    ids, mask = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[1, 1], [1, 0]])
    cached(ids, mask)
    assert reasons(cached, ids + 1, mask) == ["not seen before"] * 2
    assert reasons(cached, ids, mask, cache_keys=[1, 2])[0].startswith("nothing stored has this form: given")


def test_memory_is_bounded(monkeypatch):
    """Only the latest computed rows are remembered."""
    monkeypatch.setattr(module, "_REMEMBERED_ROWS", 2)
    cached = cached_module(encoder(), freeze=True)
    cached(X[:1])
    cached(X)
    cache_of(cached).clear()
    gone = "it was stored and is no longer held (evicted, cleared, or refused by a full store)"
    assert [reason == gone for reason in reasons(cached, X)] == [False, False, True, True]
    assert len(Recent()._calls) == 0


def test_differing_parts():
    """At most six names, the rest as a number."""
    assert differing_parts({"a": b"1", "b": b"2"}, {"a": b"1", "c": b"3"}) == ["b", "c"]
    many = {f"p{number}": b"" for number in range(9)}
    assert differing_parts(many, {}) == ["p0", "p1", "p2", "p3", "p4", "4 more"]
    assert len(differing_parts(dict(list(many.items())[:6]), {})) == 6


def test_a_missing_row_says_how_to_ask():
    """The error of require-hit names the verb that explains."""
    cached = cached_module(encoder(), freeze=True)
    with (
        mode("require-hit"),
        pytest.raises(CacheMissError, match=r"explain\(...\) says what differs"),
    ):
        cached(X)
    assert Explanation(1, False, "x").row == 1


class Consuming(torch.nn.Module):
    """Reads each file once, and takes it away."""

    def forward(self, rows, x, table=None):
        for path in [*rows, *([] if table is None else [table])]:
            path.unlink(missing_ok=True)
        return 2 * x


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_that_the_forward_consumes(shared, tmp_path):
    """What was computed reaches the loop, although the files of the rows are gone by then."""
    files = [tmp_path / str(number) for number in range(5)]
    for file in files:
        file.write_bytes(file.name.encode())
    cached = cached_module(Consuming(), freeze=True)
    args = (files[:1], X[:1], files[4]) if shared else (files[:1], X[:1])
    assert torch.equal(cached(*args), 2 * X[:1])
    assert cache_of(cached).store.stats().rows == 1


class Noted:
    """An object with a key that counts how often it was asked for."""

    def __init__(self, number):
        self.number, self.asked = number, 0


class Ignoring(torch.nn.Module):
    """Twice its first argument."""

    def forward(self, x, rows, shared):
        return 2 * x


def noted_key(noted):
    noted.asked += 1
    return noted.number


class Frees(nn.Module):
    """Lets go of the memory of an input as soon as it has read it."""

    def forward(self, x, y):
        out = x + y
        y.untyped_storage().resize_(0)
        return out


def test_an_input_that_the_forward_frees():
    """What is not there any more is not read just to explain a miss; the call goes on, and the rest is explained."""
    cached = cached_module(Frees().eval())
    batch, other = torch.eye(3), torch.ones(3, 3)
    assert torch.equal(cached(batch, other.clone()), batch + other)
    assert [found.hit for found in cache_of(cached).explain(batch, other)] == [True] * 3
    assert "x" in reasons(cached, batch * 2, other)[0]


def test_registered_functions_are_asked_once(monkeypatch):
    """A miss asks for the key of an object once, among several arguments as alone; explaining still works."""
    monkeypatch.setattr(registry, "_by_type", dict(registry._by_type))
    monkeypatch.setattr(registry, "_resolved", {})
    register_key_extractor(Noted)(noted_key)
    rows, shared = [Noted(number) for number in range(4)], Noted(9)
    cached = cached_module(Ignoring(), freeze=True)
    assert torch.equal(cached(X, rows, shared), 2 * X)
    assert [noted.asked for noted in (*rows, shared)] == [1] * 5
    assert reasons(cached, X + 1, rows, shared)[0] == "not seen before; differs from the nearest stored row in x"
    assert reasons(cached, X, rows[::-1], shared)[0] == "not seen before"


def test_remembering_costs_a_few_objects_per_call():
    """A hundred calls leave no object for each row, only lists."""
    cached = cached_module(encoder(), freeze=True)
    for number in range(10):
        cached(torch.randn(64, 3) + number)
    recent = cache_of(cached)._attached.memo.recent
    assert len(recent._calls) == 10
    assert sum(len(call.keys) for call in recent._calls) == 640


def test_explaining_a_large_batch_is_quick():
    """All rows of a call that miss are explained in a time that grows with their number, not with its square."""
    layer = cached_module(nn.Linear(4, 3).requires_grad_(False).eval())
    for start in range(0, 4096, 512):
        layer(torch.arange(start * 4, (start + 512) * 4.0).reshape(512, 4))
    batch = -torch.rand(4096, 4) - 1

    began = time.perf_counter()
    answers = cache_of(layer).explain(batch)
    assert time.perf_counter() - began < 2, "a square takes half a minute"
    assert not any(answer.hit for answer in answers)


@pytest.mark.parametrize("verb", ["contains", "explain", "forget"])
def test_arguments_that_do_not_fit(verb):
    """Asking about a call that the module would not take says which module, and what does not fit."""
    cached = cached_module(encoder(), freeze=True)
    with pytest.raises(UsageTypeError, match=r"CountingEncoder: these arguments do not fit .*too many positional"):
        getattr(cache_of(cached), verb)(X, X)
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        getattr(cache_of(cached), verb)()


def test_an_input_that_needs_grad_is_told():
    """Its rows are stored, but such a call is bypassed while grad mode is on; without it, it hits."""
    cached = cached_module(encoder(), freeze=True)
    batch = torch.randn(4, 3)
    cached(batch)
    needy = batch.clone().requires_grad_()
    assert cache_of(cached).contains(needy) == [False] * 4
    assert "an input needs grad" in str(cache_of(cached).explain(needy)[0])
    with torch.no_grad():
        assert cache_of(cached).contains(needy) == [True] * 4
        assert cache_of(cached).explain(needy)[0].hit
