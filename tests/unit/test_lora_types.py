"""T-LoRA and LoKr by number: the mask, the orthogonal start, the Kronecker product, and what their files hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from likeness.core.lora.kronecker import Kronecker, divisor
from likeness.core.lora.timestep_rank import TimestepRank, active_ranks, last_values

ROWS, COLUMNS, RANK = 12, 8, 4


def adapter(kind, rank: int = RANK):
    return kind(nn.Linear(COLUMNS, ROWS), rank, torch.Generator().manual_seed(0))


def moved(trained):
    with torch.no_grad():
        for value in trained.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    return trained


def test_ranks_fall_from_all_to_half():
    expected = {0: 64, 1: 63, 250: 56, 500: 48, 750: 40, 999: 32, 1000: 32}
    assert {t: active_ranks(t, 1000, 64) for t in expected} == expected
    assert [active_ranks(t, 1000, 1) for t in (0, 999)] == [1, 1]


def test_the_start_is_orthogonal_has_the_last_values_and_changes_nothing():
    trained, x = adapter(TimestepRank), torch.randn(3, COLUMNS)
    torch.testing.assert_close(trained.up.T @ trained.up, torch.eye(RANK), atol=1e-5, rtol=0)
    torch.testing.assert_close(trained.down @ trained.down.T, torch.eye(RANK), atol=1e-5, rtol=0)
    matrix = torch.randn(COLUMNS, ROWS, generator=torch.Generator().manual_seed(0)) / RANK
    torch.testing.assert_close(trained.values.detach(), torch.linalg.svdvals(matrix)[-RANK:])
    assert torch.equal(last_values(ROWS, COLUMNS, RANK), last_values(COLUMNS, ROWS, RANK))
    for t in (0, 500, 999):
        trained.at(t, 1000)
        assert float(trained(x).detach().abs().max()) < 1e-6
    assert adapter(TimestepRank, 100).up.shape == (ROWS, COLUMNS)


@pytest.mark.parametrize("t", [0, 300, 999])
def test_masked_ranks_add_nothing_and_get_no_gradient(t):
    trained, x = moved(adapter(TimestepRank)), torch.randn(3, COLUMNS)
    trained.at(t, 1000)
    count = active_ranks(t, 1000, RANK)
    first = adapter(TimestepRank)
    mask = torch.diag((torch.arange(RANK) < count).float())
    weight = trained.up @ torch.diag(trained.values) @ mask @ trained.down
    weight = weight - first.up @ torch.diag(first.values) @ mask @ first.down
    torch.testing.assert_close(trained(x), x @ weight.T)
    trained(x).square().sum().backward()
    assert trained.values.grad.ne(0).tolist() == mask.diag().bool().tolist()
    tensors = trained.tensors("path")
    up, down = tensors["path.lora_up.weight"], tensors["path.lora_down.weight"]
    assert float(tensors["path.alpha"]) == len(down) == 2 * RANK
    torch.testing.assert_close(up[:, : 2 * count] @ down[: 2 * count], weight.detach())


def test_a_kronecker_product_is_added_without_being_formed():
    trained, x = adapter(Kronecker), torch.randn(2, 3, COLUMNS)
    assert not trained(x).any()
    moved(trained)
    torch.testing.assert_close(trained(x), x @ torch.kron(trained.small, trained.large).T)
    tensors = trained.tensors("path")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "path.lokr_w1": (3, 2),
        "path.lokr_w2": (4, 4),
    }
    assert trained(x.bfloat16()).dtype == torch.bfloat16
    assert [divisor(size, 16) for size in (127, 128, 360, 512, 1024)] == [1, 8, 15, 16, 16]
