"""Checks run on every rank: what is refused, on all ranks alike, so that none waits for another for ever."""

from __future__ import annotations

from typing import Any

import torch
from context_parallel_support import Rank, window
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention.flex_attention import create_block_mask

import torchhal
from torchhal.context_parallel import context_parallel
from torchhal.errors import InvalidProblem


def refused(rank: Rank, shards: tuple[Any, Any, Any], **arguments: Any) -> str:
    with context_parallel(rank.mesh):
        try:
            torchhal.attention(*shards, **arguments)
        except InvalidProblem as error:
            return str(error)
    raise AssertionError("attention() accepted shards that do not fit together")


def check_shards_with_other_heads_are_refused_on_every_rank(rank: Rank) -> None:
    heads = 2 + (rank.rank == 1)
    text = refused(rank, tuple(torch.randn(1, heads, 4, 8) for _ in range(3)))
    assert "agree on query_heads" in text
    assert "rank 0: 2, rank 1: 3" in text
    assert "along the sequence" in text


def check_shards_of_other_types_are_refused_on_every_rank(rank: Rank) -> None:
    dtype = torch.float32 if rank.rank else torch.float64
    text = refused(rank, tuple(torch.randn(1, 2, 4, 8, dtype=dtype) for _ in range(3)))
    assert "agree on query_dtype" in text
    assert "rank 0: torch.float64, rank 1: torch.float32" in text


def check_gradients_wanted_by_some_ranks_alone_are_refused_instead_of_hanging(rank: Rank) -> None:
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    k.requires_grad_(rank.rank == 0)
    text = refused(rank, (q, k, v))
    assert "key_needs_gradient" in text
    assert "every rank or of none" in text


def check_a_malformed_shard_is_refused_on_every_rank(rank: Rank) -> None:
    shape = (1, 2, 4, 8) if rank.rank else (2, 4, 8)
    text = refused(rank, tuple(torch.randn(shape) for _ in range(3)))
    assert (
        ("3 dimensions" in text)
        if rank.rank == 0
        else ("rank 0 of the context-parallel group refused" in text)
    )


def check_a_mask_of_the_wrong_width_is_refused_on_every_rank(rank: Rank) -> None:
    shards = tuple(torch.randn(1, 2, 4, 8) for _ in range(3))
    columns = 4 if rank.rank == 1 else 4 * rank.world
    text = refused(rank, shards, attn_mask=torch.ones(4, columns, dtype=torch.bool))
    assert "rank 1 gave an attn_mask of 4 rows and 4 columns" in text
    assert f"keys of all ranks, {4 * rank.world}" in text


def check_a_block_mask_of_one_shard_is_refused(rank: Rank) -> None:
    shards = tuple(torch.randn(1, 2, 4, 8) for _ in range(3))
    mask = create_block_mask(window, None, None, 4, 4, device="cpu")
    text = refused(rank, shards, block_mask=mask)
    assert f"create_block_mask(mask_mod, B, H, {4 * rank.world}, {4 * rank.world})" in text


def entering(*arguments: Any, **keywords: Any) -> str:
    try:
        with context_parallel(*arguments, **keywords):
            pass
    except InvalidProblem as error:
        return str(error)
    raise AssertionError("context_parallel() accepted it")


def check_nested_blocks_are_refused(rank: Rank) -> None:
    with context_parallel(rank.mesh):
        assert "do not nest" in entering(rank.mesh)
    with context_parallel(rank.mesh):
        pass


def check_a_mesh_of_two_dimensions_is_refused(rank: Rank) -> None:
    mesh = init_device_mesh("cpu", (rank.world, 1), mesh_dim_names=("data", "sequence"))
    text = entering(mesh)
    assert "one-dimensional" in text
    assert "mesh['sequence']" in text
    with context_parallel(mesh["data"]):
        pass


def check_an_unknown_scheme_lists_the_known_ones(rank: Rank) -> None:
    assert entering(rank.mesh, scheme="rings") == (
        "context_parallel() expects a scheme out of all_gather, auto and got 'rings'"
    )


def check_something_else_than_a_mesh_is_refused(rank: Rank) -> None:
    text = entering("cpu")
    assert "one-dimensional DeviceMesh or a ProcessGroup" in text
    assert "init_device_mesh('cpu'" in text


def check_a_process_outside_the_mesh_is_refused(rank: Rank) -> None:
    mesh = DeviceMesh("cpu", [0])
    if rank.rank == 0:
        with context_parallel(mesh):
            pass
    else:
        assert f"rank {rank.rank} is not among the ranks [0]" in entering(mesh)
