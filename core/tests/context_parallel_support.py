"""What the checks of context parallelism on each rank share: a rank, its shards, an oracle and a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import torchhal
from torchhal.context_parallel import context_parallel

QUERY_LENGTHS = {2: (5, 8), 3: (7, 0, 4)}
KEY_LENGTHS = {2: (9, 2), 3: (0, 6, 5)}


@dataclass
class Rank:
    rank: int
    world: int
    mesh: DeviceMesh

    @property
    def lengths(self) -> tuple[int, ...]:
        return QUERY_LENGTHS[self.world]

    def own(self, tensor: Tensor, lengths: tuple[int, ...] | None = None, dim: int = 2) -> Tensor:
        parts = tensor.detach().split(list(lengths or self.lengths), dim)
        return parts[self.rank].clone().requires_grad_(tensor.requires_grad)


def oracle(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None, bias: Any = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention over the whole sequence in float64; ``bias`` is added to scores, and keys are hidden where True."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1))
    return weights @ v, lse


def whole(lengths: tuple[int, ...], heads: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, heads, sum(lengths), size, dtype=dtype).requires_grad_()


def inputs(
    rank: Rank, heads: int = 4, key_heads: int = 4, keys: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole query, key and value, equal on every rank; the value's head size differs."""
    keys = keys or rank.lengths
    return whole(rank.lengths, heads, 6), whole(keys, key_heads, 6), whole(keys, key_heads, 3)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape, (got.shape, expected.shape)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def compare(
    rank: Rank,
    tensors: tuple[Tensor, Tensor, Tensor],
    expected: Tensor,
    keys: tuple[int, ...] | None = None,
    mesh: Any = None,
    **arguments: Any,
) -> None:
    """This rank's rows and gradients against those of ``expected``, computed from the whole ``tensors``."""
    lengths = (rank.lengths, keys or rank.lengths, keys or rank.lengths)
    shards = [rank.own(t, n) for t, n in zip(tensors, lengths, strict=True)]
    with context_parallel(rank.mesh if mesh is None else mesh):
        out = torchhal.attention(*shards, **arguments)
    assert isinstance(out, Tensor)
    weight = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    (out * rank.own(weight)).sum().backward()
    grads = torch.autograd.grad((expected * weight).sum(), tensors)
    close(out.detach(), rank.own(expected.detach()))  # after backward, which is a collective
    for shard, grad, n in zip(shards, grads, lengths, strict=True):
        assert shard.grad is not None
        close(shard.grad, rank.own(grad, n))


def hidden_above_diagonal(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).triu(1)


def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 4)


def window_hidden(total: int) -> Tensor:
    distance = torch.arange(total).unsqueeze(1) - torch.arange(total)
    return (distance < 0) | (distance >= 4)
