"""The page docs/reference/key-scheme.md is enough to compute keys: a reader written from it alone."""

import struct

import pytest
import torch
import xxhash
from torch import nn

from modcache import cache_of, cached_module, keys_for


def frame(tag, payload):
    return bytes([len(tag)]) + tag.encode() + struct.pack("<Q", len(payload)) + payload


def encode(value):
    if value is None:
        return frame("n", b"")
    if type(value) is bool:
        return frame("b", b"\1" if value else b"\0")
    if type(value) is int:
        return frame("i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if type(value) is float:
        return frame("f", struct.pack("<d", value))
    if type(value) is str:
        return frame("s", value.encode())
    if type(value) is bytes:
        return frame("y", value)
    if type(value) is torch.dtype:
        return frame("dtype", str(value).encode())
    if type(value) is torch.Tensor:
        return frame("tensor", encode(value.dtype) + encode(tuple(value.shape)) + hash_of(raw(value)))
    if type(value) is dict:
        return frame("{", b"".join(encode(key) + encode(item) for key, item in value.items()))
    return frame({tuple: "(", list: "["}[type(value)], b"".join(map(encode, value)))


def raw(tensor):
    return tensor.contiguous().numpy().tobytes()


def hash_of(content, seed=0):
    return xxhash.xxh3_128(content, seed=seed).digest()


def seed_of(metas, containers=(), shared=()):
    common = frame("rows", encode(1) + encode(metas) + encode(containers))
    common += b"".join(encode(path) + encode(value) for path, value in shared)
    return xxhash.xxh3_64(common).intdigest()


class Mean(nn.Module):
    """A row for each row of whatever it gets."""

    def forward(self, x, y=None, scale=1.0):
        return torch.tensor([[float(len(row)), scale] for row in (x["ids"] if isinstance(x, dict) else x)])


class TokenSums(nn.Module):
    """A sum over the tokens that the mask shows."""

    def forward(self, input_ids, attention_mask, weights=None):
        return (input_ids * attention_mask).sum(1, keepdim=True).float()


def keys_stored(module, *args, **kwargs):
    module(*args, **kwargs)
    assert cache_of(module).stats.bypassed == 0, cache_of(module).stats.reasons
    return sorted(cache_of(module).store.row_keys(cache_of(module).namespace))


@pytest.fixture
def module():
    return cached_module(Mean(), freeze=True)


def test_texts(module):
    """A text is hashed under the seed of its column, a lone surrogate as three bytes."""
    seed = seed_of((("x", "text", "list", False),))
    expected = [hash_of(text, seed) for text in (b"a cat", b"", "zwölf".encode(), b"\xed\xa0\x80")]
    assert keys_stored(module, ["a cat", "", "zwölf", "\ud800"]) == sorted(expected)


def test_one_text(module):
    """A bare text is one row, and the column is single."""
    assert keys_stored(module, "a") == [hash_of(b"a", seed_of((("x", "text", "", True),)))]


def test_tensor(module):
    """A row of a tensor is its values in C order, whatever the strides."""
    x = torch.arange(12.0).reshape(4, 3).t()
    seed = seed_of((("x", "tensor", torch.float32, (4,)),))
    assert keys_stored(module, x) == sorted(hash_of(raw(row), seed) for row in x)


def test_two_tensors_with_shared_arguments(module):
    """Small rows stand side by side; what all rows share is in the seed by content."""
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    metas = (("x", "tensor", torch.float32, (2,)), ("y", "tensor", torch.int64, ()))
    seed = seed_of(metas, shared=[("scale", 2.5)])
    expected = [hash_of(raw(one) + raw(other), seed) for one, other in zip(x, y, strict=True)]
    assert keys_stored(module, x, y, scale=2.5) == sorted(expected)


def test_a_large_tensor_and_texts(module):
    """Rows above 4,096 bytes, and rows that are no tensors, stand there as their digests."""
    x, y = torch.arange(2050.0).reshape(2, 1025), ["a", "b"]
    seed = seed_of((("x", "tensor", torch.float32, (1025,)), ("y", "text", "list", False)))
    expected = [hash_of(hash_of(raw(x[row])) + hash_of(y[row].encode()), seed) for row in range(2)]
    assert keys_stored(module, x, y) == sorted(expected)


def test_containers_and_a_shared_tensor(module):
    """A mapping is walked into and noted; a tensor of another first size is shared."""
    x, table = {"ids": torch.arange(4).reshape(2, 2)}, torch.ones(3)
    seed = seed_of((("x['ids']", "tensor", torch.int64, (2,)),), (("x", "builtins.dict", 1),), [("y", table)])
    assert keys_stored(module, x, table) == sorted(hash_of(raw(row), seed) for row in x["ids"])


def test_objects(module):
    """Rows of plain values are encoded whole."""
    rows = [(1, 2.0), (None, True), ("a", b"b"), ([1 << 70], {"a": -1})]
    seed = seed_of((("x", "objects", "list", False),))
    assert keys_stored(module, rows) == sorted(hash_of(encode(row), seed) for row in rows)


def test_given_ints(module):
    """A given int is eight bytes, in a list as in a tensor."""
    x = torch.ones(3, 2)
    seed = seed_of((("given",), ("x", "tensor", torch.float32, (2,))))
    expected = sorted(hash_of(struct.pack("<q", key), seed) for key in (5, -1, 1 << 40))
    assert keys_stored(module, x, cache_keys=[5, -1, 1 << 40]) == expected
    assert keys_stored(module, x, cache_keys=torch.tensor([5, -1, 1 << 40])) == expected


def test_given_pairs_for_texts(module):
    """Other given keys are encoded; collated pairs are tuples again."""
    seed = seed_of((("given",), ("x", "list")))
    expected = sorted(hash_of(encode((number, view)), seed) for number, view in ((7, "left"), (8, "right")))
    assert keys_stored(module, ["a", "b"], cache_keys=(torch.tensor([7, 8]), ["left", "right"])) == expected


def test_the_second_call_of_a_block(module):
    """In one `keys_for` block the number of the call is part of the meta, from the second call on."""
    x, expected = torch.ones(1, 2), []
    for first in (("given",), ("given", 1)):
        expected.append(hash_of(struct.pack("<q", 3), seed_of((first, ("x", "tensor", torch.float32, (2,))))))
    with keys_for([3]):
        module(x)
        assert keys_stored(module, x) == sorted(expected)


def test_a_function():
    """What a key function returned is encoded."""
    module = cached_module(Mean(), freeze=True, key=lambda row: (row["id"], None))
    seed = seed_of((("custom",), ("x", "list")))
    assert keys_stored(module, [{"id": 4}]) == [hash_of(encode((4, None)), seed)]


def test_tokens():
    """A row of tokens is its unpadded ids, then the rest of the row."""
    module = cached_module(TokenSums(), freeze=True, key="tokens")
    ids, mask = torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    weights = torch.tensor([0.5, 1.5])
    metas = (
        ("tokens",),
        ("input_ids", "per token", torch.int64, ()),
        ("attention_mask", "per token", torch.int64, ()),
        ("weights", "tensor", torch.float32, ()),
    )
    seed = seed_of(metas)
    expected = [hash_of(raw(ids[row, : 2 + row]) + hash_of(raw(weights[row])), seed) for row in range(2)]
    assert keys_stored(module, ids, mask, weights) == sorted(expected)


def test_one_record_per_call():
    """With ``per_row=False`` the arguments are one framed item."""
    module = cached_module(Mean(), freeze=True, per_row=False)
    x = torch.ones(2, 2)
    content = encode("x") + encode(x) + encode("scale") + encode(3.0)
    assert keys_stored(module, x, scale=3.0) == [hash_of(frame("call", content))]


def test_paths(tmp_path):
    """A file is named by its content, or by its path as it was given."""
    file = tmp_path / "a.bin"
    file.write_bytes(b"content")
    names = [str(file)]
    for key, item in (
        ("path", frame("file content", hash_of(b"content"))),
        ("name", frame("file name", encode(str(file)))),
    ):
        check = "content" if key == "path" else key
        module = cached_module(Mean(), freeze=True, key=path_of(check))
        assert keys_stored(module, names) == [hash_of(item, seed_of((("x", "path", check, "list", False),)))]


def test_paths_inside_rows_and_shared(module, tmp_path):
    """A path inside a row, and one that all rows share, is the item of the content of its file."""
    file = tmp_path / "a.bin"
    file.write_bytes(b"content")
    item = frame("file content", hash_of(b"content"))
    seed = seed_of((("x", "objects", "list", False),))
    assert keys_stored(module, [(file, 1)]) == [hash_of(frame("(", item + encode(1)), seed)]
    cache_of(module).clear()
    common = frame("rows", encode(1) + encode((("x", "text", "list", False),)) + encode(())) + encode("y") + item
    assert keys_stored(module, ["a"], file) == [hash_of(b"a", xxhash.xxh3_64(common).intdigest())]


def path_of(check):
    from modcache.keys import path

    return path(check=check)
