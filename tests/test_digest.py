"""Equal digests are equal typed values, and rows of tensors are their logical values."""

import copy
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import os
import pathlib
import struct
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modcache import row_digests as module
from modcache.digest import digest, encode, frame, seed_of, tensor_digest
from modcache.row_digests import plain_row_digests, row_digests, tensor_row_digests
from modcache.tensors import NoContentError, is_ordinary, is_readable, memory_of, settled

# --- values ---------------------------------------------------------------------------------------------

TRICKY = [
    None, False, True, 0, 1, -1, 255, 256, 2**63, -(2**63), 10**40, 0.0, -0.0, 1.0, float("inf"),
    float("nan"), 1j, 0j, "", "0", "1", "ab", "a", "b", "\ud800", "\x00", b"", b"0", b"ab", ...,
    torch.float32, torch.float16, range(2), slice(0, 2),
]  # fmt: skip
TENSORS = [
    torch.tensor(1.0), torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float16), torch.tensor([1]),
    torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t(), torch.zeros(0, 2),
    torch.zeros(2, 0), torch.tensor([-0.0]), torch.tensor([0.0]), torch.tensor([float("nan")]),
]  # fmt: skip
atoms = st.sampled_from(TRICKY) | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
hashable = st.sampled_from(["a", "b", 1, True, None, "1"])
values = st.recursive(
    atoms | st.sampled_from(TENSORS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(hashable, inner, max_size=2)
        | st.frozensets(st.sampled_from([1, 2, "a"]), max_size=2)
    ),
    max_leaves=6,
)


def typed(value):
    """What a value is, as plain tuples that compare by type and bit: the oracle of `encode`."""
    if isinstance(value, float):
        return "float", struct.pack("<d", value)
    if isinstance(value, complex):
        return "complex", struct.pack("<dd", value.real, value.imag)
    if isinstance(value, torch.Tensor):
        bits = value.contiguous().reshape(-1).view(torch.uint8).tolist() if value.numel() else []
        return "tensor", str(value.dtype), tuple(map(str, value.shape)), tuple(map(str, bits))
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(map(typed, value))
    if isinstance(value, dict):
        return "dict", tuple((typed(key), typed(item)) for key, item in value.items())
    if isinstance(value, frozenset):
        return "frozenset", tuple(sorted(repr(item) for item in value))
    return type(value).__name__, repr(value)


@given(values, values)
def test_equal_digests_are_equal_typed_values(one, other):
    """Two values have one encoding exactly if they are of one type, bit by bit, all the way down."""
    assert (encode(one) == encode(other)) == (typed(one) == typed(other))


@given(st.lists(atoms, max_size=4), st.integers(0, 4))
def test_where_one_value_ends_is_part_of_it(items, cut):
    """A list is not the same as its items grouped in another way."""
    cut = min(cut, len(items))
    grouped = [items[:cut], items[cut:]]
    assert encode(items) != encode(grouped)
    assert encode([items]) != encode(items)


def test_tricky_values_are_all_different():
    """No two of the values that Python or torch calls equal share an encoding."""
    everything = [
        *TRICKY,
        *TENSORS,
        ["ab"],
        ["a", "b"],
        ("a", "b"),
        ["a", ["b"]],
        {"a": 1},
        {"a": 1.0},
        {"a": True},
        {1, 2},
    ]
    everything += [
        frozenset({1, 2}),
        np.float64(1.0),
        np.float32(1.0),
        np.int64(1),
        np.array([1.0]),
        np.array([1.0], ">f8"),
    ]
    everything += [
        bytearray(b"ab"),
        pathlib.PurePosixPath("a"),
        torch.device("cpu"),
        torch.strided,
        torch.channels_last,
    ]
    assert len({encode(value) for value in everything}) == len(everything)


def test_numbers_of_one_value_and_many_types():
    """float32 and float16 of the same number, as scalar, array and tensor, are six values."""
    found = {encode(kind(1.5)) for kind in (np.float32, np.float16)}
    found |= {encode(np.full(1, 1.5, kind)) for kind in (np.float32, np.float16)}
    found |= {encode(torch.full((1,), 1.5, dtype=kind)) for kind in (torch.float32, torch.float16)}
    assert len(found) == 6


def test_sets_have_no_order_and_mappings_have():
    """A set is encoded the same in whatever order it was filled; a dict keeps its order."""
    assert encode({*"abcdefgh"}) == encode({*"hgfedcba"})
    assert encode({"a": 1, "b": 2}) != encode({"b": 2, "a": 1})


class Pair(NamedTuple):
    x: object
    y: object


@dataclasses.dataclass
class Point:
    x: object
    y: object = 0


@dataclasses.dataclass
class Other:
    x: object
    y: object = 0


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Name(str):  # noqa: SLOT000 - what is set on it counts
    """Says something else than it holds."""

    def __str__(self):
        return "always this"


class Count(int):
    def __int__(self):
        return 0


class Share(float):
    def __float__(self):
        return 0.0


class Blob(bytes):
    def __bytes__(self):
        return b""


def test_classes_are_part_of_the_value():
    """Equal content in another class is another value."""
    alike = [
        (1, 0),
        Pair(1, 0),
        Point(1),
        Other(1),
        [1, 0],
        {"x": 1, "y": 0},
        OrderedDict(x=1, y=0),
        Colour.RED,
        1,
        Count(1),
    ]
    alike += [torch.Size([1, 0]), Name("1"), "1", Share(1.0), 1.0, Blob(b"1"), b"1"]
    assert len({encode(value) for value in alike}) == len(alike)
    assert encode(Point(1)) == encode(Point(1))
    assert encode(Point(1)) != encode(Point(1, 2))


@pytest.mark.parametrize(("kind", "a", "b"), [(Name, "a", "b"), (Count, 1, 2), (Share, 1.0, 2.0), (Blob, b"a", b"b")])
def test_a_subclass_that_converts_oddly_is_encoded_by_what_it_holds(kind, a, b):
    """`__str__` and its like are not asked: they may say the same of different values."""
    assert encode(kind(a)) == encode(kind(a))
    assert encode(kind(a)) != encode(kind(b))


def tagged(value, tag):
    value.tag = tag
    return value


class TaggedList(list):
    pass


class TaggedSet(set):
    pass


@pytest.mark.parametrize(("cls", "content"), [(Name, "a"), (Count, 1), (TaggedList, [1]), (Point, 1), (TaggedSet, {1})])
def test_attributes_beside_the_content_count(cls, content):
    """What was set on an object beside its items or fields is part of its value."""
    assert encode(tagged(cls(content), 1)) == encode(tagged(cls(content), 1))
    assert len({encode(cls(content)), encode(tagged(cls(content), 1)), encode(tagged(cls(content), 2))}) == 3


def test_flags_without_a_name():
    """No flag, one and several are different values, although not all of them have names."""
    assert len({encode(Rights(number)) for number in range(4)}) == 4


def test_arrays():
    """Dtype, byte order, shape and values count; strides do not; arrays of objects go item by item."""
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert encode(array) == encode(np.asfortranarray(array))
    assert encode(array) == encode(np.repeat(array, 2, axis=1)[:, ::2])
    different = [array, array.T, array.reshape(3, 2), array.astype(">i4"), array.astype(np.int64), array + 1]
    different += [np.array([[1, "a"]], object), np.array([1, "a"], object), np.array([1, "b"], object)]
    different += [
        np.zeros(2, [("a", "i4"), ("b", "i4")]),
        np.zeros(2, [("a", "i4"), ("c", "i4")]),
        np.zeros((0, 2)),
        np.zeros((2, 0)),
    ]
    assert len({encode(value) for value in different}) == len(different)


ZONE = dt.timezone(dt.timedelta(hours=1))
SMALL_VALUES = [
    *map(decimal.Decimal, ("1", "1.0", "10", "-1", "0", "-0", "NaN", "sNaN", "Infinity")),
    *(fractions.Fraction(*parts) for parts in ((1, 2), (2, 1), (-1, 2))),
    *(uuid.UUID(int=number) for number in (0, 1)),
    *(dt.date(2026, month, 1) for month in (1, 11)),
    *(dt.time(second=second, tzinfo=zone) for second in (0, 1) for zone in (None, dt.timezone.utc)),
    *(dt.timedelta(microseconds=number) for number in (0, 1)),
    dt.datetime(2026, 1, 1),  # noqa: DTZ001 - one without a zone
    dt.datetime(2026, 1, 1, fold=1),  # noqa: DTZ001 - one without a zone
    dt.datetime(2026, 1, 1, microsecond=1),  # noqa: DTZ001 - one without a zone
    dt.datetime(2026, 1, 1, tzinfo=ZONE),
    dt.datetime(2026, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1), "CET")),
]


def test_small_values_of_the_standard_library():
    """Numbers, dates and the like that Python brings along count by all that they hold, and are none of each other."""
    assert len({encode(value) for value in SMALL_VALUES}) == len(SMALL_VALUES)
    for value in SMALL_VALUES:
        assert encode(copy.deepcopy(value)) == encode(value)


def test_an_array_subclass_has_no_content_of_its_own():
    """Two masked arrays that differ in their mask alone are never taken for each other."""
    for mask in ([0, 1, 0], [0, 0, 0]):
        with pytest.raises(NoContentError, match="MaskedArray"):
            encode(np.ma.array([1, 2, 3], mask=mask))


def test_a_memory_map_is_its_values(tmp_path):
    """An array that lies in a file is the same as one in memory."""
    mapped = np.memmap(tmp_path / "values", np.int64, "w+", shape=(3,))
    mapped[:] = [1, 2, 3]
    assert encode(mapped) == encode(np.array([1, 2, 3]))


class Opaque:
    pass


@pytest.mark.parametrize(
    "value",
    [
        Opaque(),
        [1, Opaque()],
        {"a": Opaque()},
        torch.Generator(),
        test_arrays,
        np.array([Opaque()]),
        {Opaque()},
        Point(Opaque()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_content(value):
    """What has no content says so, wherever it stands."""
    with pytest.raises(NoContentError, match="has no content to make a key of"):
        encode(value)


def test_more_is_asked_for_what_is_not_plain():
    """A registered kind of object is encoded by its function, at any depth; plain values are not its."""
    asked = []

    def more(value):
        asked.append(value)
        return frame(b"x", b"opaque") if isinstance(value, Opaque) else None

    found = encode([1, (Opaque(), "a"), {"k": Opaque()}, Point(Opaque()), {Opaque()}, np.array([Opaque(), 1])], more)
    assert found.count(b"opaque") == 5
    assert not any(isinstance(value, int | str) for value in asked)


def test_a_value_that_contains_itself_has_no_content():
    """A list in itself ends in `NoContentError`, not in a stack overflow."""
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(NoContentError, match="nested"):
        encode(endless)


def test_the_same_in_another_process():
    """No `hash()`, `id()` or `repr()` of this process is in an encoding."""
    code = (
        "import torch; from modcache.digest import encode;"
        "print(encode([1, 'a', {'b': 2.5}, {'x', 'y', 'z'}, torch.arange(3), torch.float16]).hex())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == encode([1, "a", {"b": 2.5}, {"z", "y", "x"}, torch.arange(3), torch.float16]).hex()


def test_frame_and_seed():
    """A frame is tag length, tag, payload length, payload; a seed is its 64-bit digest."""
    assert frame(b"ab", b"xyz") == b"\x02ab" + (3).to_bytes(8, "little") + b"xyz"
    assert seed_of(b"a") != seed_of(b"b")
    assert 0 <= seed_of(b"a") < 1 << 64
    assert digest(b"a", 1) != digest(b"a", 2)
    assert len(digest(b"")) == 16


# --- tensors --------------------------------------------------------------------------------------------


def _has_values(dtype):
    """Whether tensors of this dtype exist on their own and can be copied (not those of half a byte)."""
    try:
        tensor = torch.zeros(4 * dtype.itemsize, dtype=torch.uint8).view(dtype)
        return tensor.reshape(2, 2).t().contiguous().shape == (2, 2)
    except (RuntimeError, NotImplementedError, TypeError):
        return False


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # complex32 is experimental
    DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
    DTYPES = sorted({dtype for dtype in DTYPES if _has_values(dtype)}, key=str)


def values_of(dtype, *shape):
    """A contiguous tensor of random bits of this dtype."""
    count = int(np.prod(shape)) * dtype.itemsize
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def rows_by_hand(tensor, seed=0):
    """One digest per row, of the bytes of a contiguous copy: the oracle."""
    return [
        digest(
            bytes(
                row.detach().resolve_conj().resolve_neg().clone().contiguous().reshape(-1).view(torch.uint8).tolist()
            ),
            seed,
        )
        for row in tensor
    ]


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows apart": lambda x: torch.empty(5, 2, 3, 2, dtype=x.dtype)[:, 0].copy_(x),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "every other": lambda x: torch.empty(5, 3, 2, 2, dtype=x.dtype)[..., 0].copy_(x),
    "parameter": lambda x: nn.Parameter(x, requires_grad=x.dtype.is_floating_point or x.dtype.is_complex),
    "reversed twice": lambda x: x.flip(0).flip(0),
}


def test_every_dtype_is_covered():
    """The list of dtypes under test has the ordinary ones and those that numpy does not know."""
    expected = {
        torch.bool,
        torch.uint8,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.complex64,
        torch.uint16,
    }
    assert expected <= set(DTYPES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_dtype_and_strides(dtype, layout):
    """A row's digest is that of its values in C order, however they lie in memory."""
    tensor = values_of(dtype, 5, 3, 2)
    laid = LAYOUTS[layout](tensor)
    assert tensor_row_digests(laid, 7) == rows_by_hand(tensor, 7)
    assert tensor_digest(laid) == tensor_digest(tensor)


@pytest.mark.parametrize("width", [1, 300, 700])
def test_paths_agree(width, monkeypatch):
    """Small, large, strided and threaded batches give the digests of the plain path."""
    tensor = values_of(torch.float32, 6, width, 2)
    strided = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    expected = rows_by_hand(tensor, 3)
    for large in (1, 1 << 30):
        monkeypatch.setattr(module, "_LARGE_ROW", large)
        assert tensor_row_digests(tensor, 3) == expected
    for limit in (1, 1 << 30):
        monkeypatch.setattr(module, "_STRIDED_ROW", limit)
        assert tensor_row_digests(strided, 3) == expected
    for threads in (1, 2, 4):
        monkeypatch.setattr(module, "_THREADED_BATCH", 1)
        monkeypatch.setattr(module, "processors", lambda threads=threads: threads)
        assert tensor_row_digests(tensor, 3) == expected
        assert tensor_row_digests(strided.contiguous(), 3) == expected


@pytest.mark.parametrize("width", [1023, 1024, 4096])
@pytest.mark.parametrize("count", [0, 1, 2, 1024, 1025])
def test_rows_are_cut_alike_however_many_there_are(count, width):
    """Each way of cutting rows out of a memory gives each row its own digest, and again for other content."""
    for start in (0, 1):
        content = (bytes(range(start, 256)) * (count * width // 255 + 1))[: count * width]
        rows = [content[at : at + width] for at in range(0, count * width, width)]
        assert row_digests(memoryview(content), count, width, 9) == [digest(row, 9) for row in rows]


@given(st.integers(0, 9), st.integers(0, 70), st.integers(0, 2**64 - 1), st.integers(1, 4))
def test_row_digests(count, width, seed, threads):
    """Rows behind each other are digested one by one, for every count, width and number of threads."""
    content = np.random.default_rng(count * 100 + width).bytes(count * width)
    expected = [digest(content[row * width : (row + 1) * width], seed) for row in range(count)]
    assert row_digests(memoryview(content), count, width, seed) == expected
    assert module._threaded_row_digests(memoryview(content), count, width, seed, threads) == expected


def test_large_batches_really_go_through_threads():
    """A batch of 16 MiB is shared between threads where there are several processors."""
    tensor = torch.zeros(16, 1 << 18)
    seen = set()

    class Spy:
        def submit(self, part, span):
            seen.add(span)
            return made.submit(part, span)

        def get(self):
            return self

    made = module._pool.get()
    pool, module._pool = module._pool, Spy()
    threads, module.processors = module.processors, lambda: 2
    try:
        assert tensor_row_digests(tensor, 0) == [digest(bytes(1 << 20))] * 16
    finally:
        module._pool, module.processors = pool, threads
    assert seen == {(8, 16)}


def test_number_of_threads(monkeypatch):
    """At most four, and no more than the processors that the process may use."""
    assert 1 <= module.processors() <= 4
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert module.processors() == 1


def test_rows_are_digested_where_no_thread_can_be_started(monkeypatch):
    """At a limit of the system, and while the interpreter ends, one thread does it all."""

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    pool = module._Pool()
    monkeypatch.setattr(module, "_pool", pool)
    content = bytes(range(200))
    expected = [digest(content[start : start + 20], 7) for start in range(0, 200, 20)]
    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", refuse)
        assert module._threaded_row_digests(memoryview(content), 10, 20, 7, 2) == expected
    assert module._threaded_row_digests(memoryview(content), 10, 20, 7, 2) == expected
    pool.end()


def test_an_interrupted_digest_leaves_no_reader_behind(monkeypatch):
    """The memory of an input may be freed once the call is over: by then no thread reads it any more."""
    caller, reading, read = threading.get_ident(), threading.Event(), []

    def interrupted(memory, seed):
        if threading.get_ident() == caller:
            reading.wait(10)
            raise KeyboardInterrupt
        reading.set()
        time.sleep(0.2)
        read.append(len(memory))
        return b""

    monkeypatch.setattr(module, "_pool", module._Pool())
    monkeypatch.setattr(module, "digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module._threaded_row_digests(memoryview(bytes(40)), 2, 20, 7, 2)
    assert read == [20]


def test_the_pool_is_made_anew_in_a_child(monkeypatch):
    """Threads do not survive a fork, so a child gets a pool of its own."""
    pool = module._Pool()
    first = pool.get()
    assert pool.get() is first
    monkeypatch.setattr(os, "getpid", lambda: -1)
    second = pool.get()
    assert second is not first
    for made in (first, second):
        made.shutdown()


def test_conjugated_and_negated():
    """Lazy conjugation and negation are carried out before values are looked at."""
    tensor = torch.complex(torch.randn(4, 3), torch.randn(4, 3))
    assert tensor.conj().is_conj()
    assert tensor.conj().imag.is_neg()
    assert tensor_row_digests(tensor.conj(), 0) == rows_by_hand(tensor.conj().resolve_conj())
    assert tensor_row_digests(tensor.conj().imag, 0) == rows_by_hand(-tensor.imag)
    assert tensor_row_digests(tensor, 0) != tensor_row_digests(tensor.conj(), 0)


def test_a_tensor_is_not_its_transpose():
    """The same bytes in another shape, and the same values in another order, are other tensors."""
    tensor = torch.arange(4.0).reshape(2, 2)
    assert len({encode(tensor), encode(tensor.t()), encode(tensor.reshape(4)), encode(tensor.reshape(1, 4))}) == 4


def test_rows_without_elements():
    """Empty rows are rows, and no rows are no digests."""
    assert tensor_row_digests(torch.zeros(3, 0), 5) == [digest(b"", 5)] * 3
    assert tensor_row_digests(torch.zeros(0, 3), 5) == []
    assert memory_of(torch.zeros(0)) == memoryview(b"")


def test_a_digested_tensor_can_still_be_resized():
    """No trace is left on the user's storage, as `.numpy()` would."""
    tensor = torch.arange(6.0)
    encode(tensor)
    tensor_row_digests(tensor, 0)
    tensor.untyped_storage().resize_(0)
    assert tensor.untyped_storage().nbytes() == 0


def freed():
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(0)
    return tensor


class Own(torch.Tensor):
    pass


UNREADABLE = {
    "meta": lambda: torch.zeros(2, device="meta"),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "subclass": lambda: torch.zeros(2).as_subclass(Own),
    "freed": freed,
}


def test_memory_that_was_given_back_is_not_read():
    """A tensor whose storage was made smaller is never read beyond its end, on the quick path neither."""
    tensor = torch.zeros(4, 1000)
    assert plain_row_digests(tensor, 3) == tensor_row_digests(tensor, 3)
    tensor.untyped_storage().resize_(8)
    for digests in (tensor_row_digests, plain_row_digests):
        with pytest.raises(NoContentError, match="has no readable values"):
            digests(tensor, 0)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_tensors_have_no_content(kind):
    """A tensor whose values do not lie in memory of its own is never dereferenced."""
    tensor = UNREADABLE[kind]()
    assert not is_readable(tensor)
    for ask in (encode, tensor_digest, settled, lambda value: tensor_row_digests(value, 0)):
        with pytest.raises(NoContentError, match="has no readable values"):
            ask(tensor)


def test_tensors_under_vmap_have_no_content():
    """A tensor that a `torch.func` transform hands in stands for many."""
    seen = []
    torch.func.vmap(lambda row: seen.append(is_readable(row)) or row)(torch.zeros(2, 2))
    assert seen == [False]


def test_ordinary_tensors():
    """Parameters are ordinary; subclasses are not."""
    assert is_ordinary(torch.zeros(1))
    assert is_ordinary(nn.Parameter(torch.zeros(1)))
    assert not is_ordinary(torch.zeros(1).as_subclass(Own))
    assert is_readable(torch.zeros(3).expand(5, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_rows_on_an_accelerator():
    """Where a tensor lies is no part of its digest."""
    tensor = torch.randn(4, 3)
    assert tensor_row_digests(tensor.cuda(), 1) == tensor_row_digests(tensor, 1)


def test_many_threads_digest_at_once():
    """Digests of one batch are the same from every thread."""
    tensor = values_of(torch.float32, 64, 200)
    expected, found = tensor_row_digests(tensor, 0), []
    workers = [threading.Thread(target=lambda: found.append(tensor_row_digests(tensor, 0))) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [expected] * 8
