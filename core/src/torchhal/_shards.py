"""The exchange that opens a context-parallel call: every rank learns every shard's shape, and checks them all.

All checks are made on the exchanged numbers, so either every rank goes on or every rank raises: none waits in
a collective that another has left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchhal._checks import FLOATING, attention_fault
from torchhal.errors import InvalidProblem

if TYPE_CHECKING:
    from torchhal.context_parallel import AttentionArguments


class Lengths(NamedTuple):
    """Rows and keys of each rank, in rank order."""

    query: tuple[int, ...]
    key: tuple[int, ...]


class Shard(NamedTuple):
    """What a rank tells the others of its call, as whole numbers."""

    refused: int = 0
    """1 when the rank's own tensors are no shards at all; the other fields are then 0."""
    query_length: int = 0
    key_length: int = 0
    mask_rows: int = 0
    """Rows and columns of ``attn_mask``; 1 where it broadcasts, or without one."""
    mask_columns: int = 0
    block_rows: int = -1
    """Sequence lengths of ``block_mask``; -1 without one."""
    block_columns: int = -1
    batch: int = 0
    key_batch: int = 0
    query_heads: int = 0
    key_heads: int = 0
    head_size: int = 0
    value_head_size: int = 0
    query_dtype: int = 0
    key_dtype: int = 0
    value_dtype: int = 0
    is_causal: int = 0
    enable_gqa: int = 0
    key_needs_gradient: int = 0
    """1 when backward will reach the keys or values of this rank."""


_SHARED: Final = Shard._fields[Shard._fields.index("batch") :]
"""Fields that have to agree on all ranks."""


def exchange(arguments: AttentionArguments, group: Any) -> Lengths:
    """Tell all ranks of ``group`` about this call and check that all shards fit together.

    Costs one all-gather of 19 numbers, and waits for it.

    Raises:
        InvalidProblem: on every rank alike, naming the ranks and the field at fault.
    """
    fault = _own_fault(arguments)
    own = Shard(refused=1) if fault else describe(arguments)
    shards = [own] if dist.get_world_size(group) == 1 else _all_gather(own, _device(arguments), group)
    if fault:
        raise InvalidProblem(fault)
    text = disagreement(shards)
    if text:
        raise InvalidProblem(text)
    return Lengths(tuple(s.query_length for s in shards), tuple(s.key_length for s in shards))


def describe(arguments: AttentionArguments) -> Shard:
    """This rank's shard in numbers."""
    query, key, value = arguments.query, arguments.key, arguments.value
    rows, columns = (1, 1) if arguments.attn_mask is None else (1, 1, *arguments.attn_mask.shape)[-2:]
    blocks = (-1, -1) if arguments.block_mask is None else arguments.block_mask.seq_lengths
    needs_gradient = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    return Shard(
        query_length=query.shape[2],
        key_length=key.shape[2],
        mask_rows=rows,
        mask_columns=columns,
        block_rows=blocks[0],
        block_columns=blocks[1],
        batch=query.shape[0],
        key_batch=key.shape[0],
        query_heads=query.shape[1],
        key_heads=key.shape[1],
        head_size=query.shape[3],
        value_head_size=value.shape[3],
        query_dtype=FLOATING.index(query.dtype),
        key_dtype=FLOATING.index(key.dtype),
        value_dtype=FLOATING.index(value.dtype),
        is_causal=int(arguments.is_causal),
        enable_gqa=int(arguments.enable_gqa),
        key_needs_gradient=int(needs_gradient),
    )


def disagreement(shards: list[Shard]) -> str:
    """Why these shards, in rank order, are not one sequence; empty when they are. The same on every rank."""
    refused = [rank for rank, shard in enumerate(shards) if shard.refused]
    if refused:
        return f"rank {refused[0]} of the context-parallel group refused its own shards; its error says why"
    for name in _SHARED:
        values = [getattr(shard, name) for shard in shards]
        if len(set(values)) > 1:
            shown = ", ".join(f"rank {rank}: {_show(name, value)}" for rank, value in enumerate(values))
            return f"context-parallel shards have to agree on {name} and do not ({shown}). {_advice(name)}"
    return next(filter(None, (_mask_fault(rank, shards) for rank in range(len(shards)))), "")


# ---------------------------------------------------------------------------- parts


def _own_fault(arguments: AttentionArguments) -> str:
    query, key, value = arguments.query, arguments.key, arguments.value
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if isinstance(tensor, Tensor) and tensor.is_nested:
            return f"context-parallel attention expects {name} as a dense tensor (B, H, this rank's rows, E) and got a nested one"
    return attention_fault(query, key, value, "dense", arguments.enable_gqa)


def _mask_fault(rank: int, shards: list[Shard]) -> str:
    shard = shards[rank]
    rows, columns = sum(s.query_length for s in shards), sum(s.key_length for s in shards)
    if shard.mask_rows not in (1, shard.query_length) or shard.mask_columns not in (1, columns):
        return (
            f"rank {rank} gave an attn_mask of {shard.mask_rows} rows and {shard.mask_columns} columns; under "
            f"context_parallel() it has this rank's {shard.query_length} query rows (or 1) and the keys of all "
            f"ranks, {columns} (or 1)"
        )
    if shard.block_rows >= 0 and (shard.block_rows, shard.block_columns) != (rows, columns):
        return (
            f"rank {rank} gave a BlockMask for {shard.block_rows} query rows and {shard.block_columns} keys; under "
            f"context_parallel() it covers the whole sequence, {rows} and {columns}: create_block_mask(mask_mod, B, H, {rows}, {columns})"
        )
    return ""


def _show(name: str, value: int) -> str:
    if name.endswith("dtype"):
        return str(FLOATING[value])
    return str(bool(value)) if name in ("is_causal", "enable_gqa", "key_needs_gradient") else str(value)


def _advice(name: str) -> str:
    if name == "key_needs_gradient":
        return (
            "Set requires_grad on the keys and values of every rank or of none: backward needs all of them."
        )
    if name in ("is_causal", "enable_gqa"):
        return "Pass the same arguments on every rank."
    return "Shard along the sequence (dim 2) alone, with everything else alike."


def _device(arguments: AttentionArguments) -> torch.device:
    tensors = (arguments.query, arguments.key, arguments.value)
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))


def _all_gather(own: Shard, device: torch.device, group: Any) -> list[Shard]:
    sent = torch.tensor(own, dtype=torch.int64, device=device)
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group=group)
    return [Shard(*numbers) for numbers in torch.stack(received).tolist()]
