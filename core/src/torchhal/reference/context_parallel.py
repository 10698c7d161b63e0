"""Context parallelism by the plainest scheme: gather all keys and values, then attend with this rank's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchhal.problems import ContextParallelProblem, Decline, Plan

if TYPE_CHECKING:
    from torchhal.context_parallel import LocalAttention


def plan(problem: ContextParallelProblem) -> Plan | Decline:
    """Serves every process group: it needs only ``all_gather`` and ``all_reduce`` on equal shapes."""
    if problem.scheme not in ("auto", "all_gather"):
        return Decline(
            "unclaimed_scheme", f"gathers keys and values (all_gather) and has no {problem.scheme!r}"
        )
    return Plan(
        run=all_gather_attention,
        description=f"all-gather of keys and values over {problem.world_size} ranks, then local attention",
        deterministic=False,  # the order of the sum of gradients is the process group's
        differentiable=True,
        workspace="O(S) keys and values of all ranks, and O(L * S) bytes for a causal mask",
    )


def all_gather_attention(call: LocalAttention, query: Tensor, key: Tensor, value: Tensor, group: Any) -> Any:
    """This rank's rows of ``attention(all queries, all keys, all values)``, gradients included.

    Args:
        call: runs attention on this device for this rank's rows, and knows every rank's lengths.
        query: (B, Hq, L, E), this rank's rows.
        key: (B, Hkv, S, E), this rank's keys; S may differ from rank to rank and be 0.
        value: (B, Hkv, S, Ev).
        group: the process group; of one rank, nothing is communicated.

    Returns:
        ``out`` (B, Hq, L, Ev), or ``(out, lse)``.

    The gradient of the gather is a sum over ranks, in float32 or wider, of which each keeps its part. Every
    rank has to run backward if any does.
    """
    if len(call.key_lengths) > 1:
        key, value = _GatherSequence.apply(key, value, call.key_lengths, call.rank, group)  # type: ignore[no-untyped-call]
    return call(query, key, value)


class _GatherSequence(torch.autograd.Function):
    # Keys and values go together, so that their gradients are reduced in the same order on every rank.

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, lengths: tuple[int, ...], rank: int, group: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.lengths, ctx.rank, ctx.group = lengths, rank, group
        return _gather(key, lengths, group), _gather(value, lengths, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = [_reduce(grad, ctx.lengths, ctx.rank, ctx.group) for grad in grads]
        return (*parts, None, None, None)


def _gather(shard: Tensor, lengths: tuple[int, ...], group: Any) -> Tensor:
    """(B, H, sum of lengths, E). Shards are padded to one length: not every backend gathers uneven ones."""
    batch, heads, own, size = shard.shape
    sent = shard.new_zeros((batch, heads, max(lengths), size))
    sent[:, :, :own] = shard
    received = [torch.empty_like(sent) for _ in lengths]
    dist.all_gather(received, sent, group=group)
    return torch.cat([part[:, :, :n] for part, n in zip(received, lengths, strict=True)], dim=2)


def _reduce(grad: Tensor, lengths: tuple[int, ...], rank: int, group: Any) -> Tensor:
    """This rank's part of the sum over ranks of ``grad``; all_reduce, since not every backend has reduce_scatter."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.to(wide).clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    own = total.narrow(2, sum(lengths[:rank]), lengths[rank])
    return own.to(grad.dtype)
