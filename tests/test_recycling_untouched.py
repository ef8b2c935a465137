"""Running a model and leaving no trace on it."""

import pytest
import torch
from torch import nn

from modcache import cache_of, recycle
from modcache.recycling.untouched import untouched

LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


class Heads(nn.Module):
    """Keeps which of its heads count in a sparse buffer, as Whisper does."""

    def __init__(self, layout):
        super().__init__()
        self.register_buffer("heads", torch.eye(4).to_sparse(layout=layout), persistent=False)
        self.below, self.above = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.above(self.below(x))


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_model_with_a_sparse_buffer_can_be_cut(layout):
    """A buffer above or beside the cut may have any layout: rows are found, and the buffer is left alone."""
    model, x = Heads(layout), torch.randn(4, 4)
    with torch.no_grad():
        plain = model(x)
    recycle(model, at="above")
    for _ in range(2):
        assert torch.allclose(model(x), plain)
    assert cache_of(model).stats.hits >= 4
    assert torch.equal(model.heads.to_dense(), torch.eye(4))


def test_a_sparse_buffer_that_was_written_is_put_back():
    """What a forward does to the values of a sparse buffer is undone."""
    model = Heads(torch.sparse_coo)
    with untouched(model, set()):
        model.heads.mul_(2)
    assert torch.equal(model.heads.to_dense(), torch.eye(4))
