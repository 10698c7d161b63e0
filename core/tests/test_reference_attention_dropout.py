"""Dropout of the reference attention: its generator, its statistics, and what it does to the result."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from attention_calls import NAN, call, close, qkv, same
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.reference.dropout import dropout_keep, philox


def grid(b: int, h: int, q: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,))
    b_, h_, q_, k_ = (
        torch.arange(n, dtype=torch.int32).view(s) for n, s in zip((b, h, q, k), shapes, strict=True)
    )
    return b_, h_, q_, k_


@pytest.mark.parametrize(("counter", "key", "words"), [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
])  # fmt: skip
def test_the_generator_gives_the_known_answers_of_random123(counter: str, key: str, words: str) -> None:
    first, second = ([torch.tensor(int(word, 16)) for word in text.split()] for text in (counter, key))
    result = philox(tuple(first), tuple(second))  # type: ignore[arg-type]
    assert " ".join(f"{int(word):08x}" for word in result) == words


def test_a_pair_draws_the_documented_word() -> None:
    seed, b, h, q, k = -5, 2, 3, 70000, 1003
    counter = tuple(torch.tensor(word) for word in (k // 4, q, h, b))
    words = philox(counter, (torch.tensor(2**32 - 5), torch.tensor(2**32 - 1)))  # type: ignore[arg-type]
    threshold = int(words[k % 4])
    place = (torch.tensor(b), torch.tensor(h), torch.tensor(q), torch.tensor(k))
    assert dropout_keep(seed, *place, threshold / 2**32)
    assert not dropout_keep(torch.tensor(seed), *place, (threshold + 1) / 2**32)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_rate_of_dropping_is_p_overall_and_in_each_head_row_and_column(p: float) -> None:
    dropped = (~dropout_keep(1234, *grid(2, 4, 64, 128), p)).double()
    for dims in ((0, 1, 2, 3), (2, 3), (0, 1, 3), (0, 1, 2)):
        rate = dropped.mean(dims)
        count = dropped.numel() / rate.numel()
        assert ((rate - p).abs() < 5 * math.sqrt(p * (1 - p) / count)).all()


@pytest.mark.parametrize("shift", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 4)])
def test_neighbours_in_every_direction_are_independent(shift: tuple[int, ...]) -> None:
    keep = dropout_keep(99, *grid(4, 4, 64, 64), 0.5).numpy().astype(float) - 0.5
    one = keep[tuple(slice(s, None) for s in shift)]
    other = keep[tuple(slice(None, -s if s else None) for s in shift)]
    assert abs(np.mean(one * other)) * 4 < 5 / math.sqrt(one.size)


@pytest.mark.parametrize("seeds", [(0, 1), (7, 7 + 2**32), (3, -3), (2**62, 2**62 + 1)])
def test_different_seeds_give_independent_patterns(seeds: tuple[int, int]) -> None:
    one, other = (dropout_keep(seed, *grid(1, 2, 64, 128), 0.5).double() - 0.5 for seed in seeds)
    assert abs(float((one * other).mean())) * 4 < 5 / math.sqrt(one.numel())


def test_the_pattern_depends_on_the_place_alone_not_on_the_shape_asked_for() -> None:
    whole = dropout_keep(5, *grid(2, 3, 9, 17), 0.3)
    b, h, q, k = grid(2, 3, 9, 17)
    assert torch.equal(dropout_keep(5, b[1:], h[2:], q[4:7], k[3::2], 0.3), whole[1:, 2:, 4:7, 3::2])


@pytest.mark.parametrize("p", [-0.1, 1.1, NAN])
def test_a_probability_outside_0_to_1_is_refused(p: float) -> None:
    with pytest.raises(InvalidProblem, match="expected a dropout probability from 0 to 1 and got"):
        dropout_keep(0, *grid(1, 1, 1, 1), p)


def test_probabilities_are_dropped_and_rescaled_and_the_lse_is_not() -> None:
    query, key, value = qkv(2, 4, 2, 5, 9, 8, 3)
    result = call(query, key, value, is_causal=True, dropout_p=0.25, seed=torch.tensor(42))
    factor = dropout_keep(42, *grid(2, 4, 5, 9), 0.25).double().numpy() / 0.75
    close(result, oracle.attention(query, key, value, scale=8**-0.5, is_causal=True, factor=factor))
    same((result[1],), (call(query, key, value, is_causal=True)[1],))


def test_dropping_everything_gives_zeros_and_keeps_the_lse() -> None:
    tensors = tuple(t.requires_grad_() for t in qkv(1, 2, 2, 3, 4, 8, 8))
    out, lse = call(*tensors, dropout_p=1.0, seed=torch.tensor(0))
    assert (out == 0).all()
    same((lse,), (call(*tensors)[1],))
    torch.autograd.backward(out.sum())
    assert all(t.grad is not None and (t.grad == 0).all() for t in tensors)


def test_packed_sequences_drop_what_dense_ones_do() -> None:
    query, key, value = qkv(2, 2, 2, 3, 5, 8, 8)
    rules: dict[str, Any] = {"dropout_p": 0.5, "seed": torch.tensor(8)}
    dense = call(query, key, value, **rules)
    flat, keys, values = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    starts: dict[str, Any] = {
        f"cu_seqlens_{x}": torch.tensor([0, n, 2 * n], dtype=torch.int32) for x, n in (("q", 3), ("k", 5))
    }
    out, lse = call(flat, keys, values, layout="varlen", **starts, **rules)
    torch.testing.assert_close(out, dense[0].transpose(1, 2).flatten(0, 1))
    torch.testing.assert_close(lse, dense[1].transpose(1, 2).flatten(0, 1))


def test_dropout_without_a_seed_is_refused() -> None:
    with pytest.raises(InvalidProblem, match="attention with dropout needs a seed, a 0-dim int64 tensor"):
        call(*qkv(1, 1, 1, 1, 1, 1, 1), dropout_p=0.5)
