"""What every store promises, as tests that a test of a store inherits."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from modcache.rows import Layout, Lent, Rows
from modcache.stores import Found, Store

VECTOR = Layout("*", ((torch.float32, (3,)),))
PAIR = Layout('["tuple", 0, 1]', ((torch.bfloat16, (2, 2)), (torch.int64, ())))
LAYOUTS = {
    "vector": VECTOR,
    "pair": PAIR,
    "scalar": Layout("*", ((torch.float64, ()),)),
    "half": Layout("*", ((torch.float16, (5,)),)),
    "flags": Layout("*", ((torch.bool, (7,)),)),
    "float8": Layout("*", ((torch.float8_e4m3fn, (4,)),)),
    "complex": Layout("*", ((torch.complex64, (2,)),)),
    "bytes": Layout("*", ((torch.uint8, (1, 3, 1)),)),
    "empty": Layout("*", ((torch.float32, (0, 4)),)),
    "no leaves": Layout("null", ()),
}


def key(number: int) -> bytes:
    """A key that looks like a digest."""
    return np.random.default_rng(number).bytes(16)


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


def rows_of(numbers: Sequence[int], layout: Layout = VECTOR) -> Rows:
    """Rows whose every element tells its number."""
    tensors = []
    for dtype, shape in layout.leaves:
        column = torch.tensor([float(n) for n in numbers]).reshape(-1, *[1] * len(shape))
        tensors.append(column.expand(len(numbers), *shape).to(dtype).contiguous())
    return Rows(layout, tuple(tensors))


def answers(found: Sequence[Found]) -> dict[int, tuple[Layout, list[bytes]]]:
    """Position -> layout and the bytes of each leaf, of all that was found."""
    answered = {}
    for part in found:
        assert part.positions.dtype == np.int64
        assert (np.diff(part.positions) > 0).all(), "positions ascend"
        for (dtype, shape), tensor in zip(part.rows.layout.leaves, part.rows.tensors, strict=True):
            assert tensor.dtype == dtype
            assert tensor.shape == (len(part.positions), *shape)
            assert tensor.is_contiguous()
            assert not tensor.requires_grad
        for place, position in enumerate(part.positions.tolist()):
            assert position not in answered, "a position is answered once"
            answered[position] = (part.rows.layout, [bytes_of(t[place]) for t in part.rows.tensors])
    assert len({part.rows.layout for part in found}) == len(found), "one Found per layout"
    return answered


def lent_answers(lent: Sequence[Lent]) -> dict[int, tuple[Layout, list[bytes]]]:
    """What `answers` gives, of rows that are lent."""
    assert len({part.layout for part in lent}) == len(lent), "one Lent per layout"
    return {
        position: (part.layout, [leaf[row].tobytes() for leaf in part.leaves])
        for part in lent
        for position, row in zip(part.positions.tolist(), part.rows.tolist(), strict=True)
    }


def expected(numbers: dict[int, int], layout: Layout = VECTOR) -> dict[int, tuple[Layout, list[bytes]]]:
    """What `answers` gives for rows of these numbers at these positions."""
    return {
        position: (layout, [bytes_of(tensor[0]) for tensor in rows_of([number], layout).tensors])
        for position, number in numbers.items()
    }


def bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


class StoreContract:
    """Inherit, and give a fixture ``store`` that makes an empty store with room for a few hundred rows."""

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        raise NotImplementedError

    def test_is_a_store(self, store: Store) -> None:
        """It meets the protocol."""
        assert isinstance(store, Store)

    def test_nothing_is_found_in_an_empty_store(self, store: Store) -> None:
        """An empty store has no rows, no keys and no namespaces."""
        assert store.get("a", keys(1)) == ()
        assert store.row_keys("a") == []
        assert store.namespaces() == []
        assert store.stats().rows == store.stats().bytes == store.stats().namespaces == 0

    def test_gives_back_what_was_put(self, store: Store) -> None:
        """Rows come back at the places of their keys, absent ones are left out."""
        assert store.put("a", keys(1, 2, 3), rows_of([1, 2, 3])) == 3
        found = store.get("a", keys(3, 9, 1))
        assert len(found) == 1
        assert answers(found) == expected({0: 3, 2: 1})
        assert store.get("a", keys(8, 9)) == ()

    def test_all_found(self, store: Store) -> None:
        """When every key is there, the positions are all places."""
        store.put("a", keys(*range(50)), rows_of(range(50)))
        wanted = [7, 3, 49, 0]
        assert answers(store.get("a", keys(*wanted))) == expected(dict(enumerate(wanted)))

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    @pytest.mark.filterwarnings("ignore:ComplexHalf")
    def test_layouts(self, store: Store, layout: Layout) -> None:
        """Every dtype and shape comes back bit for bit, also rows without a byte."""
        store.put("a", keys(1, 0, 2), rows_of([1, 0, 2], layout))
        assert answers(store.get("a", keys(0, 2, 5))) == expected({0: 0, 1: 2}, layout)
        assert store.delete("a", keys(1)) == 1
        assert answers(store.get("a", keys(0, 1, 2))) == expected({0: 0, 2: 2}, layout)

    def test_duplicates_are_answered_each(self, store: Store) -> None:
        """A key that is asked for twice is answered twice, in memory of its own."""
        store.put("a", keys(1, 2), rows_of([1, 2]))
        (found,) = store.get("a", keys(1, 2, 1))
        assert answers([found]) == expected({0: 1, 1: 2, 2: 1})
        found.rows.tensors[0][0] = 99
        assert found.rows.tensors[0][2, 0] == 1

    def test_the_last_of_equal_keys_counts(self, store: Store) -> None:
        """When one put names a key twice, its last row stays, and it is one row."""
        assert store.put("a", keys(1, 2, 1), rows_of([10, 20, 11])) == 2
        assert answers(store.get("a", keys(1, 2))) == expected({0: 11, 1: 20})
        assert store.stats().rows == 2

    def test_overwrites(self, store: Store) -> None:
        """A row that is put again replaces the old one."""
        store.put("a", keys(1, 2), rows_of([1, 2]))
        assert store.put("a", keys(2, 3), rows_of([22, 3])) == 2
        assert answers(store.get("a", keys(1, 2, 3))) == expected({0: 1, 1: 22, 2: 3})
        assert store.stats().rows == 3

    def test_overwrites_with_another_layout(self, store: Store) -> None:
        """A row may come back with another layout, and then it has only that one."""
        store.put("a", keys(1, 2, 3), rows_of([1, 2, 3]))
        assert store.put("a", keys(2), rows_of([22], PAIR)) == 1
        assert answers(store.get("a", keys(1, 2, 3))) == {
            **expected({0: 1, 2: 3}),
            **expected({1: 22}, PAIR),
        }
        assert store.stats().rows == 3

    def test_many_layouts_in_one_namespace(self, store: Store) -> None:
        """Rows of different lengths live side by side: one Found for each layout."""
        lengths = {n: Layout("*", ((torch.int32, (n,)),)) for n in range(20)}
        for n, layout in lengths.items():
            store.put("a", keys(n, n + 100), rows_of([n, n + 100], layout))
        wanted = [n for pair in zip(range(20), range(119, 99, -1), strict=True) for n in pair]
        want = {i: expected({i: n}, lengths[n % 100])[i] for i, n in enumerate(wanted)}
        assert answers(store.get("a", keys(*wanted))) == want

    def test_namespaces_are_apart(self, store: Store) -> None:
        """The same key in two namespaces is two rows."""
        store.put("a", keys(1), rows_of([1]))
        store.put("b", keys(1), rows_of([2]))
        assert answers(store.get("a", keys(1))) == expected({0: 1})
        assert answers(store.get("b", keys(1))) == expected({0: 2})
        assert sorted(store.namespaces()) == ["a", "b"]
        assert store.stats().namespaces == 2

    def test_delete_rows(self, store: Store) -> None:
        """Deleted rows are gone, the others stay, and the count is of rows that were there."""
        store.put("a", keys(*range(10)), rows_of(range(10)))
        assert store.delete("a", keys(0, 4, 4, 77)) == 2
        assert sorted(store.row_keys("a")) == sorted(keys(1, 2, 3, 5, 6, 7, 8, 9))
        rest = {i: i for i in range(10) if i not in (0, 4)}
        assert answers(store.get("a", keys(*range(10)))) == expected(rest)
        assert store.delete("nowhere", keys(1)) == store.delete("a", []) == 0

    def test_delete_a_namespace(self, store: Store) -> None:
        """Without keys, a whole namespace goes, and only that one."""
        store.put("a", keys(1, 2), rows_of([1, 2]))
        store.put("b", keys(1), rows_of([1]))
        assert store.delete("a") == 2
        assert store.get("a", keys(1, 2)) == ()
        assert store.namespaces() == ["b"]
        assert store.delete("a") == 0

    def test_a_row_can_return(self, store: Store) -> None:
        """What was deleted can be put again."""
        store.put("a", keys(1), rows_of([1]))
        store.delete("a")
        store.put("a", keys(1), rows_of([5], PAIR))
        assert answers(store.get("a", keys(1))) == expected({0: 5}, PAIR)

    def test_no_keys(self, store: Store) -> None:
        """No keys give nothing and put nothing."""
        assert store.put("a", [], rows_of([])) == 0
        assert store.get("a", []) == ()
        assert store.namespaces() == []

    def test_strange_keys(self, store: Store) -> None:
        """Any sixteen bytes are a key: zeros, ones, and keys that differ in one bit."""
        strange = [bytes(16), b"\xff" * 16, bytes(15) + b"\x01", b"\x01" + bytes(15), bytes(8) + b"\xff" * 8]
        store.put("a", strange[:4], rows_of(range(4)))
        assert answers(store.get("a", strange)) == expected({0: 0, 1: 1, 2: 2, 3: 3})

    def test_strange_namespaces(self, store: Store) -> None:
        """Any short text is a namespace."""
        names = ["", "a/b", "..", "ä ö", "x" * 64]
        for number, name in enumerate(names):
            store.put(name, keys(1), rows_of([number]))
        assert sorted(store.namespaces()) == sorted(names)
        for number, name in enumerate(names):
            assert answers(store.get(name, keys(1))) == expected({0: number})

    def test_wrong_batches(self, store: Store) -> None:
        """Another number of keys than rows, or a key of another length, is an error that says so."""
        with pytest.raises(ValueError, match=r"2 row keys, but tensors of \[1\] rows"):
            store.put("a", keys(1, 2), rows_of([1]))
        with pytest.raises(ValueError, match="16 bytes, but one of 3 bytes"):
            store.put("a", [b"abc"], rows_of([1]))

    def test_what_is_got_is_private(self, store: Store) -> None:
        """Writing into a result changes neither the store nor another result."""
        store.put("a", keys(1, 2), rows_of([1, 2]))
        first, second = store.get("a", keys(1, 2)), store.get("a", keys(1, 2))
        first[0].rows.tensors[0].fill_(77)
        assert answers(second) == expected({0: 1, 1: 2})
        assert answers(store.get("a", keys(1, 2))) == expected({0: 1, 1: 2})

    def test_what_is_put_is_copied(self, store: Store) -> None:
        """The caller may write into its tensors as soon as the put returns, before any flush."""
        for layout in (VECTOR, PAIR):
            rows = rows_of([1, 2], layout)
            store.put("a", keys(1, 2), rows)
            for tensor in rows.tensors:
                tensor.zero_()
            assert answers(store.get("a", keys(1, 2))) == expected({0: 1, 1: 2}, layout)
            store.flush()
            assert answers(store.get("a", keys(1, 2))) == expected({0: 1, 1: 2}, layout)

    def test_what_is_put_stays_resizable(self, store: Store) -> None:
        """Nothing is left on the storage of a tensor that was put."""
        rows = rows_of([1, 2])
        store.put("a", keys(1, 2), rows)
        store.flush()
        rows.tensors[0].untyped_storage().resize_(0)

    @pytest.mark.parametrize("name", ["vector", "pair", "half", "float8", "complex", "scalar"])
    @pytest.mark.parametrize("guard", [torch.no_grad, torch.enable_grad])
    def test_results_take_part_in_autograd(self, store: Store, name: str, guard: type) -> None:
        """A result can be changed in place by something that requires grad, whatever mode it was got in."""
        layout = LAYOUTS[name]
        store.put("a", keys(1, 2), rows_of([1, 2], layout))
        with guard():
            (found,) = store.get("a", keys(1, 2))
        out = found.rows.tensors[0]
        weight = torch.ones(out.shape, requires_grad=True)
        out.copy_(weight.to(out.dtype))
        out.to(torch.complex64).real.sum().backward()
        assert weight.grad is not None
        assert weight.grad.eq(1).all()

    def test_inference_mode(self, store: Store) -> None:
        """Rows that were put in inference mode are ordinary tensors outside of it, and the reverse."""
        with torch.inference_mode():
            store.put("a", keys(1), rows_of([1]))
        store.put("a", keys(2), rows_of([2]))
        (found,) = store.get("a", keys(1, 2))
        assert not found.rows.tensors[0].is_inference()
        (found.rows.tensors[0] * torch.ones(3, requires_grad=True)).sum().backward()
        with torch.inference_mode():
            store.put("a", keys(2, 3), rows_of([22, 3]))
            assert answers(store.get("a", keys(1, 2, 3))) == expected({0: 1, 1: 22, 2: 3})

    def test_default_device(self, store: Store) -> None:
        """A default device of the user changes nothing."""
        rows = rows_of([1, 2])
        try:
            torch.set_default_device("meta")
            store.put("a", keys(1, 2), rows)
            found = store.get("a", keys(2, 1))
        finally:
            torch.set_default_device(None)
        assert answers(found) == expected({0: 2, 1: 1})

    def test_grad_and_strides_of_what_is_put(self, store: Store) -> None:
        """A tensor that requires grad or is strided or conjugated is stored by its values."""
        strided = torch.arange(6.0).reshape(3, 2).T.requires_grad_()
        store.put("a", keys(1, 2), Rows(VECTOR, (strided,)))
        assert store.get("a", keys(2))[0].rows.tensors[0].tolist() == [[1.0, 3.0, 5.0]]
        conjugate = torch.tensor([[1 + 2j, 3j]]).conj()
        store.put("b", keys(1), Rows(LAYOUTS["complex"], (conjugate,)))
        assert store.get("b", keys(1))[0].rows.tensors[0].tolist() == [[1 - 2j, -3j]]

    def test_many_rows(self, store: Store) -> None:
        """Rows put in many batches and partly deleted are all found where they belong."""
        for start in range(0, 200, 7):
            batch = range(start, min(start + 7, 200))
            store.put("a", keys(*batch), rows_of(batch))
        gone = range(0, 200, 3)
        assert store.delete("a", keys(*gone)) == len(gone)
        rest = {i: i for i in range(200) if i % 3}
        assert answers(store.get("a", keys(*range(200)))) == expected(rest)
        assert store.stats().rows == len(rest)

    def test_threads(self, store: Store) -> None:
        """Threads that put, get and delete at once see each row right or not at all."""
        wrong: list[object] = []

        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(60):
                numbers = random.integers(0, 60, 8).tolist()
                try:
                    store.put("a", keys(*numbers), rows_of(numbers))
                    store.delete("a", keys(*numbers[:3]))
                    for part in store.get("a", keys(*numbers)):
                        want = [numbers[i] for i in part.positions.tolist()]
                        if part.rows.tensors[0][:, 0].tolist() != want:
                            wrong.append((want, part.rows.tensors[0]))
                except Exception as error:
                    wrong.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(store.row_keys("a")) == store.stats().rows

    def test_flush_and_close(self, store: Store) -> None:
        """A flush changes nothing; a closed store finds nothing, admits nothing, and may be closed again."""
        store.put("a", keys(1), rows_of([1]))
        store.flush()
        assert answers(store.get("a", keys(1))) == expected({0: 1})
        store.close()
        store.close()
        assert store.get("a", keys(1)) == ()
        assert store.put("a", keys(2), rows_of([2])) == 0
        assert store.delete("a", keys(1)) == 0
        store.flush()


class AbilitiesContract(StoreContract):
    """For stores that also have `contains`, `retire` and `rename`."""

    def test_contains(self, store) -> None:
        """`contains` tells which rows are there, in any namespace."""
        store.put("a", keys(1, 2), rows_of([1, 2]))
        assert store.contains("a", keys(2, 3, 1, 1)).tolist() == [True, False, True, True]
        assert store.contains("b", keys(1)).tolist() == [False]
        assert store.contains("a", []).tolist() == []

    def test_retired_rows_are_still_found(self, store) -> None:
        """A retired namespace is served as long as there is room."""
        store.put("a", keys(1), rows_of([1]))
        store.retire("a")
        store.retire("a")
        store.retire("nowhere")
        assert answers(store.get("a", keys(1))) == expected({0: 1})

    def test_rename(self, store) -> None:
        """After a rename the rows belong to the new name only."""
        store.put("a", keys(1, 2), rows_of([1, 2]))
        store.rename("a", "b")
        assert store.get("a", keys(1)) == ()
        assert answers(store.get("b", keys(1, 2))) == expected({0: 1, 1: 2})
        assert store.namespaces() == ["b"]
        store.rename("b", "b")
        store.rename("nowhere", "b")
        assert answers(store.get("b", keys(1, 2))) == expected({0: 1, 1: 2})

    def test_rename_to_a_name_in_use(self, store) -> None:
        """Renamed rows join those of the new name, and replace them where both have a key."""
        store.put("a", keys(1, 2), rows_of([1, 2]))
        store.put("a", keys(3), rows_of([3], PAIR))
        store.put("b", keys(2, 3, 4), rows_of([22, 33, 44]))
        store.rename("a", "b")
        have = expected({0: 1, 1: 2, 3: 44}) | expected({2: 3}, PAIR)
        assert answers(store.get("b", keys(1, 2, 3, 4))) == have
        assert store.namespaces() == ["b"]
        assert store.stats().rows == 4


class LendingContract(AbilitiesContract):
    """For stores that also have `lend`."""

    lends = True  # whether all of its rows lie in memory of the host

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    @pytest.mark.filterwarnings("ignore:ComplexHalf")
    def test_lent_rows_are_those_that_are_got(self, store, layout) -> None:
        """What is lent has the bytes, the layouts and the positions of what a get gives."""
        store.put("a", keys(1, 0, 2), rows_of([1, 0, 2], layout))
        store.put("a", keys(3, 4), rows_of([3, 4], PAIR))
        for wanted in (keys(0, 2, 0), keys(3, 0, 4, 1), keys(4)):
            got = answers(store.get("a", wanted))
            assert store.lend("a", wanted, lent_answers) in ((got,) if self.lends else (got, None))

    def test_nothing_is_lent_unless_all_are_there(self, store) -> None:
        """A missing row, or an unknown namespace, leaves the rows to a get."""
        store.put("a", keys(1, 2), rows_of([1, 2]))
        store.put("a", keys(3), rows_of([3], PAIR))
        for namespace, wanted in (("a", keys(1, 9)), ("a", keys(3, 9)), ("b", keys(1))):
            assert store.lend(namespace, wanted, lent_answers) is None
