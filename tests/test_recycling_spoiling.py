"""Where a forward puts plain values is found in its code, and other values are there for a while."""

import torch
from torch import nn

from modcache.recycling.spoiling import kept_by, spoiled


class Keeping(nn.Module):
    """Sets one attribute in its forward, one in a method of it, and one when it is made."""

    def __init__(self):
        super().__init__()
        self.made, self.flag, self.sizes, self.tensor = 1, True, (1, 2), torch.ones(1)

    def forward(self, x):
        self.flag = bool(x.sum() > 0)
        self.tensor = x
        return self.note(x)

    def note(self, x):
        def inner():
            self.sizes = tuple(x.shape)

        inner()
        return x

    def other(self):
        self.made = 2


class Items(nn.Module):
    def __init__(self):
        super().__init__()
        self.known, self.listed = {"text": "a", "number": 1.5}, [1, None]

    def forward(self, x):
        self.known["text"] = "b"
        return x


def test_only_what_a_forward_may_set_is_found():
    """Methods that it calls and functions inside of these count; others and tensors do not."""
    module = Keeping()
    assert {kept.key for kept in kept_by([("m", module)], [])} == {"flag", "sizes"}
    assert kept_by([("m", nn.Linear(2, 2))], []) == []


def test_values_are_others_for_a_while():
    """Flags, texts, numbers and sizes are others, or gone, and come back in their order."""
    for module in (Keeping(), Items()):
        before = {name: str(value) for name, value in vars(module).items()}
        places = kept_by([("m", module)], [])
        for gone in (True, False):
            with spoiled(places, gone=gone):
                assert {name: str(value) for name, value in vars(module).items()} != before
            assert list(before.items()) == [(name, str(value)) for name, value in vars(module).items()]
