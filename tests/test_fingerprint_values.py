"""Values that a module holds: which count by what they are, and which by their class alone."""

import os
import sys
import types
import uuid

import numpy as np
import pytest
import torch
from torch import nn

from modcache import cache_of, cached_module
from modcache.fingerprint import Identity

from .hazards import agree, frozen, pair

X = torch.arange(8.0).reshape(2, 4)


def fingerprint(held):
    module = nn.Identity()
    module.held = held
    return Identity().fingerprint(module)


def nested(value, depth):
    for _ in range(depth):
        value = [value]
    return value


def test_what_is_nested_deeper_than_is_read_counts_by_its_class():
    """Reading ends at some depth, and says so, instead of failing at the limit of recursion."""
    one, other = (fingerprint(nested(value, 2000)) for value in (1, 2))
    assert one.digest == other.digest
    assert len(one.opaque) == 1
    assert fingerprint(nested(1, 40)).digest != fingerprint(nested(2, 40)).digest


class Unbound:
    """Stands for an object that is not there yet, as the proxies of web frameworks do."""

    def __getattribute__(self, name):
        raise RuntimeError("working outside of its context")


def test_a_proxy_of_what_is_not_there_counts_by_its_class():
    """An object that does not even say of what class it is neither breaks a call nor keeps it from being cached."""
    found = fingerprint([Unbound()])
    assert any("Unbound" in place for place in found.opaque)


LOADED, ENVIRONMENT = sys.modules, os.environ


class Asks(nn.Module):
    """Asks the process, as code does that works with and without some package."""

    def forward(self, x):
        return x * 2 if "no_such_package" in LOADED or ENVIRONMENT.get("NO_SUCH_VARIABLE") else x


def test_what_is_loaded_and_the_environment_are_no_part_of_a_module(monkeypatch):
    """Another process has other Python modules and variables, and finds the rows all the same."""
    one = Identity().fingerprint(Asks())
    monkeypatch.setitem(sys.modules, "just_loaded", types.ModuleType("just_loaded"))
    monkeypatch.setenv("OF_ANOTHER_JOB", "17")
    assert Identity().fingerprint(Asks()).digest == one.digest
    assert fingerprint(LOADED).digest != fingerprint(ENVIRONMENT).digest


class Lazy:
    """Makes what it is asked for, and notes that in a table."""

    __slots__ = ("made", "table")

    def __init__(self, table):
        self.table = table

    def __getattr__(self, name):
        self.table[name] = 1
        raise AttributeError(name)


def test_a_table_that_grows_while_it_is_read():
    """An entry that comes to a dictionary when another one is looked at does not keep a call from being cached."""
    table = {}
    table["first"] = Lazy(table)
    module = nn.Identity()
    module.table = table
    cached_module(module, freeze=True)
    assert torch.equal(module(X), X)
    assert cache_of(module).stats.computed == 2


def test_a_compiled_view_of_a_module_leaves_its_rows():
    """`torch.compile(module)` notes on the module that it was compiled, and the rows of before are still found."""
    module = cached_module(nn.Linear(4, 3), freeze=True)
    module(X)
    before = cache_of(module).namespace
    torch.compile(module, backend="eager")
    assert cache_of(module).namespace == before
    module(X)
    assert cache_of(module).stats.hits == 2


class Rearrange(nn.Module):
    """Stands for the layer of einops of this name."""

    def __init__(self, pattern, known):
        super().__init__()
        self.pattern = pattern
        self._multirecipe = {4: known}

    def forward(self, x):
        return x.flatten(1)


Rearrange.__module__ = "einops.layers.torch"


def test_a_layer_of_einops_counts_by_its_pattern():
    """The order of names in its recipes comes from a set of texts, and is another one in the next process."""
    first, second = ([*names] for names in ("hw", "wh"))
    of_process = [Identity().fingerprint(nn.Sequential(Rearrange("b (h w)", names))) for names in (first, second)]
    assert of_process[0].digest == of_process[1].digest
    other = Identity().fingerprint(nn.Sequential(Rearrange("b (w h)", first)))
    assert other.digest != of_process[0].digest


class Attention(nn.Module):
    """Names what it keeps between steps of a decoder as the layers of fairseq and ESM do."""

    def __init__(self):
        super().__init__()
        self._incremental_state_id = str(uuid.uuid4())


def test_a_random_name_of_a_layer_of_fairseq_does_not_count():
    """Another process gives its layers other names, and finds the rows all the same."""
    assert Identity().fingerprint(Attention()).digest == Identity().fingerprint(Attention()).digest


class Marker:
    __slots__ = ()


def test_an_object_that_can_have_no_attributes_is_listed():
    """Nothing can be read from it, so it counts by its class, and the manifest names it."""
    found = fingerprint(Marker())
    assert any("Marker" in place for place in found.opaque)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.dtype("float32"), np.dtype("float64")),
        (np.dtype([("a", "i4")]), np.dtype([("b", "i4")])),
        (np.add, np.multiply),
    ],
)
def test_objects_of_numpy_count_by_what_they_are(one, other):
    """A dtype or function of numpy that a module holds is told from another one."""
    assert fingerprint(one).digest == fingerprint(one).digest != fingerprint(other).digest


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning", "ignore::DeprecationWarning")
def test_weights_packed_by_channel_count_by_all_of_their_scales():
    """Two layers that differ in the scale of one channel alone are two."""
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]

    def packed(scale):
        scales, zeros = torch.tensor([1.0, scale]), torch.zeros(2, dtype=torch.int64)
        weight = torch.quantize_per_channel(torch.ones(2, 3), scales, zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(weight, None)

    assert fingerprint(packed(0.5)).digest == fingerprint(packed(0.5)).digest != fingerprint(packed(0.25)).digest


def test_an_object_of_compiled_code_that_gives_no_state_cannot_be_read():
    """What such an object holds may be anything, so the module is named as one that cannot be cached."""
    module = frozen(nn.Identity())
    module.held = torch.classes.profiling._ScriptProfile()
    (place,) = Identity().check(module, False).unreadable
    assert "held" in place


def test_one_array_at_two_places_is_followed():
    """A write to an array is seen by whichever of its names it is done."""
    array = np.ones(3, np.float32)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = array, [array]

        def forward(self, x):
            return x * float(self.other[0].sum())

    cached, plain = pair(frozen(Scaled()))
    agree(cached, plain, X)
    cached.other[0][1] = plain.other[0][1] = 5
    agree(cached, plain, X)


class Ragged(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))

    def forward(self, x):
        return x + 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # said once in a process
def test_a_buffer_without_a_shape_is_left_to_the_version():
    """A nested tensor cannot be read and has no shape; a version stands for it."""
    module = cached_module(frozen(Ragged()), version="1")
    assert torch.equal(module(X), X + 1)
    assert torch.equal(module(X), X + 1)
    assert cache_of(module).stats.hits == len(X)


class Cutting(nn.Module):
    """Asks something of transformers, or what stands for it, how many numbers of a row it is to look at."""

    def __init__(self, helper, name):
        super().__init__()
        self.helper, self.name = helper, name

    def forward(self, x):
        return x[:, : getattr(self.helper, self.name)].sum(1, keepdim=True)


class PreTrainedTokenizerBase:
    """As in transformers: a vocabulary that cannot be read, and settings that a run may change."""

    def __init__(self, length):
        self.model_max_length = length
        self._tokenizer = torch.Generator()


class ImageProcessingMixin:
    """As in transformers: what it does to an image is in its attributes."""

    def __init__(self, size):
        self.size = size


@pytest.mark.parametrize(
    ("make", "name"), [(PreTrainedTokenizerBase, "model_max_length"), (ImageProcessingMixin, "size")]
)
def test_settings_of_tokenizers_and_processors_count(make, name, tmp_path):
    """A later run that cuts texts elsewhere, or scales images otherwise, is served no row of the earlier one."""
    for length, hits in ((4, 0), (2, 0), (4, 2)):
        cached = cached_module(Cutting(make(length), name), freeze=True, store=tmp_path)
        assert torch.equal(cached(X), X[:, :length].sum(1, keepdim=True))
        assert cache_of(cached).stats.hits == hits
        setattr(cached.helper, name, 3)  # and while it runs
        assert torch.equal(cached(X), X[:, :3].sum(1, keepdim=True))
        cache_of(cached).close()


def test_a_tokenizer_is_still_listed():
    """Its vocabulary is not read, so the manifest names it."""
    assert any("PreTrainedTokenizerBase" in place for place in fingerprint(PreTrainedTokenizerBase(4)).opaque)
