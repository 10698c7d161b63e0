"""What the portable kernels decline, and what they refuse, in words; and where Triton is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import interpreted  # noqa: F401  (skips where Triton is missing)
import pytest
import torch
from attention_calls import qkv
from torch import Tensor

from torchhal import portable
from torchhal.errors import InvalidProblem
from torchhal.operands import AttentionOperands
from torchhal.portable import arguments, attention
from torchhal.portable.tiles import PLAIN, Tiles, padded
from torchhal.problems import AttentionProblem

CPU = torch.device("cpu")


@pytest.fixture
def asked_again() -> Iterator[None]:
    """Whether Triton is there is looked at anew, and forgotten afterwards."""
    portable.unavailable.cache_clear()
    yield
    portable.unavailable.cache_clear()


@pytest.mark.usefixtures("asked_again")
def test_without_triton_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.language", None)
    found = attention.decline(AttentionProblem(CPU))
    assert found is not None
    assert found.code == "triton_missing"
    assert "install the triton package that belongs to this torch" in found.reason


@pytest.mark.usefixtures("asked_again")
@pytest.mark.parametrize(
    ("release", "code"), [("3.5.1", "triton_too_old"), ("3.6.0+git12", None), ("4.0", None)]
)
def test_a_triton_before_the_first_tried_release_is_declined(
    release: str, code: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: release)
    found = portable.unavailable()
    assert (found and found.code) == code
    if found is not None:
        assert found.reason == "triton is 3.5.1; 3.6 or later is needed"


@pytest.mark.parametrize(("fields", "code", "words"), [
    ({"head_size": 577}, "head_size", "a head size of 577 is not served; the kernels go up to 576"),
    ({"value_head_size": 1000}, "head_size", "a head size of 1000"),
    ({"value_head_size": 0}, "head_size", "values without elements"),
    ({"layout": "varlen", "block_size": (8, 8)}, "varlen_block_mask", "a BlockMask over packed sequences"),
])  # fmt: skip
def test_what_the_kernels_do_not_do_is_declined_with_a_code(
    fields: dict[str, Any], code: str, words: str
) -> None:
    found = attention.decline(AttentionProblem(CPU, **fields))
    assert found is not None
    assert (found.code, words in found.reason) == (code, True)


def test_everything_else_is_served() -> None:
    assert (
        attention.decline(AttentionProblem(CPU, head_size=576, value_head_size=1, block_size=(8, 8))) is None
    )


def refused(problem: AttentionProblem, tensors: tuple[Tensor, ...], **operands: Any) -> str:
    with pytest.raises(InvalidProblem) as caught:
        attention.runner(problem)(*tensors, None, 1.0, AttentionOperands(**operands))
    return str(caught.value)


def test_lengths_and_tables_that_are_absent_are_asked_for() -> None:
    packed = tuple(torch.ones(5, 1, 16) for _ in range(3))
    problem = AttentionProblem(CPU, layout="varlen", head_size=16, value_head_size=16)
    assert refused(problem, packed) == (
        "variable-length attention needs cu_seqlens_q and cu_seqlens_k, and at least one is absent"
    )
    nothing = torch.zeros(1, dtype=torch.int32)
    assert refused(problem, packed, cu_seqlens_q=nothing, cu_seqlens_k=nothing) == (
        "cu_seqlens_q must end at the number of tokens, 5; it is 0 alone"
    )
    paged = AttentionProblem(CPU, layout="paged", head_size=16, value_head_size=16, page_size=4)
    tensors = qkv(1, 1, 1, 1, 4, 16, 16, torch.float32)
    assert "needs page_table and seq_lens" in refused(paged, tensors)


def test_a_block_mask_for_another_call_is_refused() -> None:
    tensors = qkv(2, 3, 3, 20, 8, 16, 16, torch.float32)
    fields: dict[str, Any] = {"query_heads": 3, "key_heads": 3, "head_size": 16, "value_head_size": 16}
    problem = AttentionProblem(CPU, block_size=(8, 8), **fields)
    counts, indices = torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    lists = {"kv_num_blocks": counts, "kv_indices": indices}
    assert refused(problem, tensors, **lists) == (
        "the BlockMask must cover every query position, 20; it has 2 blocks of 8 rows"
    )
    wide = {
        name: torch.zeros(5, 2, 3, *tensor.shape[3:], dtype=torch.int32) for name, tensor in lists.items()
    }
    assert refused(problem, tensors, **wide) == (
        "the BlockMask must be for 1 or 2 sequences and 1 or 3 query heads; it is for 5 and 2"
    )
    assert "needs problem.block_size" in refused(AttentionProblem(CPU, **fields), tensors, **lists)


def test_dropout_without_a_seed_is_refused() -> None:
    problem = AttentionProblem(CPU, head_size=16, value_head_size=16, dropout=True)
    tensors = qkv(1, 1, 1, 1, 4, 16, 16, torch.float32)
    assert "needs a seed, a 0-dim int64 tensor" in refused(problem, tensors, dropout_p=0.5)


def test_tensor_descriptors_are_made_only_of_memory_that_they_can_describe() -> None:
    whole = torch.zeros(2, 3, 32, 16)
    assert arguments.describable(whole, whole.transpose(1, 2))
    for other in (
        whole[..., 1:], whole[..., :15].contiguous(), whole.mT, whole[:1].expand(2, 3, 32, 16), whole[:, :, :0],
    ):  # fmt: skip
        assert not arguments.describable(whole, other)


def test_tiles_shrink_to_the_smallest_and_then_no_further() -> None:
    tiles: Tiles | None = Tiles(64, 32, warps=8, stages=3)
    seen = []
    while tiles is not None:
        seen.append((tiles.rows, tiles.keys, tiles.stages))
        tiles = tiles.smaller()
    assert seen == [(64, 32, 3), (64, 32, 2), (64, 32, 1), (64, 16, 1), (32, 16, 1), (16, 16, 1)]


def test_plain_tiles_are_small_for_every_head_size() -> None:
    for size in (1, 64, 129, 576):
        tiles = PLAIN.prefill(AttentionProblem(CPU, head_size=size, value_head_size=1))
        assert tiles.keys * padded(size) <= 16 * 1024
