"""Checks run on every rank: results and gradients equal those of attention over the whole sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from context_parallel_support import (
    KEY_LENGTHS,
    Rank,
    close,
    compare,
    hidden_above_diagonal,
    inputs,
    oracle,
    whole,
    window,
    window_hidden,
)
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import torchhal
from torchhal.context_parallel import context_parallel
from torchhal.selection import routes


def check_full_attention_and_gradients_equal_those_of_the_whole_sequence(rank: Rank) -> None:
    tensors = inputs(rank)
    compare(rank, tensors, oracle(*tensors)[0])


def check_a_process_group_serves_as_well_as_a_mesh(rank: Rank) -> None:
    tensors = inputs(rank)
    compare(rank, tensors, oracle(*tensors)[0], mesh=dist.group.WORLD)


def check_causal_attention_counts_positions_in_the_whole_sequence(rank: Rank) -> None:
    tensors = inputs(rank)
    total = sum(rank.lengths)
    compare(rank, tensors, oracle(*tensors, hidden_above_diagonal(total, total))[0], is_causal=True)


def check_causal_cross_attention_with_other_key_shards_aligns_top_left(rank: Rank) -> None:
    keys = KEY_LENGTHS[rank.world]
    tensors = inputs(rank, keys=keys)
    hidden = hidden_above_diagonal(sum(rank.lengths), sum(keys))
    compare(rank, tensors, oracle(*tensors, hidden)[0], keys=keys, is_causal=True)


def check_grouped_queries_share_keys_and_their_gradients(rank: Rank) -> None:
    tensors = inputs(rank, heads=6, key_heads=2)
    total = sum(rank.lengths)
    expected = oracle(*tensors, hidden_above_diagonal(total, total))[0]
    compare(rank, tensors, expected, is_causal=True, enable_gqa=True)


def check_boolean_mask_has_local_rows_and_all_keys(rank: Rank) -> None:
    tensors = inputs(rank)
    total = sum(rank.lengths)
    mask = torch.rand(2, 1, total, total) < 0.6
    mask[:, :, :2] = False  # fully masked rows
    expected = oracle(*tensors, ~mask)[0]
    compare(rank, tensors, expected, attn_mask=rank.own(mask))


def check_additive_mask_joins_causality_and_gets_its_gradient(rank: Rank) -> None:
    tensors = inputs(rank)
    total = sum(rank.lengths)
    bias = torch.randn(4, total, total, dtype=torch.float64, requires_grad=True)
    expected = oracle(*tensors, hidden_above_diagonal(total, total), bias)[0]
    own = rank.own(bias, dim=1)
    with context_parallel(rank.mesh):
        out = torchhal.attention(*(rank.own(t) for t in tensors), attn_mask=own, is_causal=True)
    assert isinstance(out, Tensor)
    close(out, rank.own(expected.detach()))
    out.square().sum().backward()
    (grad,) = torch.autograd.grad(expected.square().sum(), bias)
    assert own.grad is not None
    close(own.grad, rank.own(grad, dim=1))


def check_score_mod_sees_positions_in_the_whole_sequence(rank: Rank) -> None:
    tensors = inputs(rank)
    total = sum(rank.lengths)
    slopes = torch.randn(4, dtype=torch.float64)
    distance = torch.arange(total).unsqueeze(1) - torch.arange(total)
    bias = slopes[:, None, None] * distance + torch.arange(total).unsqueeze(1).square() / 64
    # The quadratic term is the same for all keys of a row, so it shows in the LSE alone.
    expected, lse = oracle(*tensors, bias=bias)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + slopes[h] * (q_idx - kv_idx) + q_idx * q_idx / 64

    compare(rank, tensors, expected, score_mod=score_mod)
    with context_parallel(rank.mesh), torch.no_grad():
        _, own = torchhal.attention(*(rank.own(t) for t in tensors), score_mod=score_mod, return_lse=True)
    close(own, rank.own(lse.detach()))


def check_block_mask_over_the_whole_sequence_serves_any_shards(rank: Rank) -> None:
    total = sum(rank.lengths)
    for block_size in (2, 3, 128):
        tensors = inputs(rank)
        mask = create_block_mask(window, None, None, total, total, device="cpu", BLOCK_SIZE=block_size)
        compare(rank, tensors, oracle(*tensors, window_hidden(total))[0], block_mask=mask)


def check_block_mask_made_of_blocks_alone_is_honoured_block_by_block(rank: Rank) -> None:
    total, size = sum(rank.lengths), 3
    blocks = -(-total // size)
    counts = torch.ones(1, 1, blocks, dtype=torch.int32)
    indices = torch.arange(blocks, dtype=torch.int32).unsqueeze(1).expand(1, 1, blocks, blocks).contiguous()
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=size, seq_lengths=(total, total))
    tensors = inputs(rank)
    position = torch.arange(total) // size
    expected = oracle(*tensors, position.unsqueeze(1) != position)[0]
    compare(rank, tensors, expected, block_mask=mask)


def check_block_mask_joins_score_mod_and_attn_mask(rank: Rank) -> None:
    total = sum(rank.lengths)
    tensors = inputs(rank)
    block_mask = create_block_mask(window, None, None, total, total, device="cpu", BLOCK_SIZE=4)
    bias = torch.randn(total, total, dtype=torch.float64)
    position = torch.arange(total, dtype=torch.float64)
    expected = oracle(*tensors, window_hidden(total), bias + position * position.unsqueeze(1) / 8)[0]
    compare(
        rank,
        tensors,
        expected,
        block_mask=block_mask,
        attn_mask=rank.own(bias, dim=0),
        score_mod=lambda score, b, h, q_idx, kv_idx: score + q_idx * kv_idx / 8,
    )


def check_lse_is_that_of_the_whole_sequence_and_has_gradients(rank: Rank) -> None:
    tensors = inputs(rank)
    total = sum(rank.lengths)
    out, lse = oracle(*tensors, hidden_above_diagonal(total, total))
    shards = [rank.own(t) for t in tensors]
    with context_parallel(rank.mesh):
        own_out, own_lse = torchhal.attention(*shards, is_causal=True, return_lse=True)
    close(own_out, rank.own(out.detach()))
    close(own_lse, rank.own(lse.detach()))
    (own_out.sum() + own_lse.square().sum()).backward()
    for shard, grad in zip(shards, torch.autograd.grad(out.sum() + lse.square().sum(), tensors), strict=True):
        assert shard.grad is not None
        close(shard.grad, rank.own(grad))


def check_half_precision_gradients_are_summed_in_float32(rank: Rank) -> None:
    total = sum(rank.lengths)
    tensors = tuple(whole(rank.lengths, 2, 8, torch.bfloat16) for _ in range(3))
    expected = oracle(*tensors, hidden_above_diagonal(total, total))[0]
    shards = [rank.own(t) for t in tensors]
    with context_parallel(rank.mesh):
        out = torchhal.attention(*shards, is_causal=True)
    assert isinstance(out, Tensor)
    assert out.dtype is torch.bfloat16
    close(out, rank.own(expected.detach()), 3e-2)
    out.double().sum().backward()
    for shard, grad in zip(shards, torch.autograd.grad(expected.sum(), tensors), strict=True):
        assert shard.grad is not None
        close(shard.grad, rank.own(grad.double()), 6e-2)


def check_dropout_keeps_the_mean(rank: Rank) -> None:
    torch.manual_seed(100 + rank.rank)
    n = 64
    q, k, v = torch.randn(2, 8, n, 4), torch.randn(2, 8, n, 4), torch.ones(2, 8, n, 1)
    with context_parallel(rank.mesh):
        out = torchhal.attention(q, k, v, dropout_p=0.5)
    assert isinstance(out, Tensor)
    assert out.std() > 0.01
    assert abs(out.mean() - 1) < 0.05


def check_keys_shared_by_the_batch_stay_shared(rank: Rank) -> None:
    q, k, v = inputs(rank)
    k, v = (t.detach()[:1].clone().requires_grad_() for t in (k, v))
    compare(rank, (q, k, v), oracle(q, k, v)[0])


def check_non_contiguous_shards_give_the_same(rank: Rank) -> None:
    tensors = inputs(rank)
    expected = oracle(*tensors)[0]
    strided = [rank.own(t).detach().transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    with context_parallel(rank.mesh):
        out = torchhal.attention(*strided)
    assert isinstance(out, Tensor)
    close(out, rank.own(expected.detach()))


def check_a_group_of_one_needs_no_communication(rank: Rank) -> None:
    groups = [dist.new_group([r]) for r in range(rank.world)]
    tensors = tuple(whole((6,), 2, 4) for _ in range(3))
    if rank.rank == 0:  # the others make no call at all
        with context_parallel(groups[0]):
            out = torchhal.attention(*tensors, is_causal=True)
        close(out, oracle(*tensors, hidden_above_diagonal(6, 6))[0])


def check_a_compiled_function_breaks_its_graph_around_the_collectives(rank: Rank) -> None:
    tensors = inputs(rank)
    expected = oracle(*tensors)[0]
    shards = [rank.own(t) for t in tensors]

    @torch.compile(backend="eager")
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torchhal.attention(q * 1.0, k, v) + 0.0

    with context_parallel(rank.mesh):
        close(model(*shards), rank.own(expected.detach()))
    with torch.no_grad():  # outside the block the compiled function is local again
        close(model(*shards), oracle(*shards)[0])


def check_the_route_names_the_scheme(rank: Rank) -> None:
    taken = [route for route in routes() if route.problem.family == "context_parallel"]
    assert any("all-gather" in route.description for route in taken), taken
    with context_parallel(rank.mesh, scheme="all_gather", backend="reference"):
        pass
