"""What freezing changes, and what is put back."""

import torch
from torch import nn

from modcache import cached_module, uncached


def test_what_was_taken_away_since_is_not_put_back():
    """Undoing restores the flags of what the module still has, whatever was removed meanwhile."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3))
    module[0].bias.requires_grad_(False)
    cached_module(module, freeze=True)
    del module[2]
    module[0].register_parameter("bias", None)
    uncached(module)
    assert module.training
    assert module[1].training
    assert [name for name, value in module.named_parameters() if value.requires_grad] == ["0.weight"]
    assert torch.equal(module[0](torch.zeros(1, 3)), torch.zeros(1, 3))
