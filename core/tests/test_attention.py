"""The public attention functions: what each misuse is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import torchhal
from torchhal.errors import CaptureError, InvalidProblem


def q(*shape: int, **kind: Any) -> torch.Tensor:
    return torch.randn(*(shape or (2, 4, 5, 8)), **kind)


MISUSES: list[tuple[str, Callable[[], Any], str]] = [
    (
        "three dimensions",
        lambda: torchhal.attention(q(4, 5, 8), q(), q()),
        r"query has 3 dimensions: \(4, 5, 8\); add the missing",
    ),
    ("no tensor", lambda: torchhal.attention([1], q(), q()), "query expects a tensor and got list"),
    (
        "integers",
        lambda: torchhal.attention(q().int(), q().int(), q().int()),
        "query expects a floating type .* and has torch.int32",
    ),
    (
        "head sizes",
        lambda: torchhal.attention(q(), q(2, 4, 5, 9), q()),
        "need the same head size, the last dimension, and have 8 and 9",
    ),
    ("no head size", lambda: torchhal.attention(q(2, 4, 5, 0), q(2, 4, 5, 0), q()), "query has head size 0"),
    ("lengths", lambda: torchhal.attention(q(), q(2, 4, 6, 8), q()), r"\(2, 4, 6, 8\) and \(2, 4, 5, 8\)"),
    (
        "batches",
        lambda: torchhal.attention(q(), q(3, 4, 5, 8), q(3, 4, 5, 8)),
        "batch size 2 and key 3; they must be equal, or the key's 1",
    ),
    (
        "heads",
        lambda: torchhal.attention(q(), q(2, 2, 5, 8), q(2, 2, 5, 8)),
        "4 heads and key 2; pass enable_gqa=True",
    ),
    (
        "groups",
        lambda: torchhal.attention(q(), q(2, 3, 5, 8), q(2, 3, 5, 8), enable_gqa=True),
        "there are 4 over 3",
    ),
    (
        "devices",
        lambda: torchhal.attention(q(), q(device="meta"), q()),
        "query is on cpu and key on meta; move them to one device",
    ),
    (
        "mask shape",
        lambda: torchhal.attention(q(), q(), q(), attn_mask=q(7, 5)),
        r"must broadcast to .* = \(2, 4, 5, 5\) and is \(7, 5\)",
    ),
    (
        "mask type",
        lambda: torchhal.attention(q(), q(), q(), attn_mask=torch.ones(5, 5, dtype=torch.int64)),
        "expects bool .* and has torch.int64",
    ),
    (
        "mask kind",
        lambda: torchhal.attention(q(), q(), q(), attn_mask=3),
        "attn_mask expects a tensor and got int",
    ),  # type: ignore[arg-type]
    (
        "mask device",
        lambda: torchhal.attention(q(), q(), q(), attn_mask=q(5, 5, device="meta")),
        "attn_mask on meta",
    ),
    (
        "block mask",
        lambda: torchhal.attention(q(), q(), q(), block_mask=q(5, 5)),
        "expects a BlockMask and got Tensor; build one with",
    ),  # type: ignore[arg-type]
    (
        "dropout",
        lambda: torchhal.attention(q(), q(), q(), dropout_p=1.5),
        "dropout_p expects a probability between 0 and 1 and got 1.5",
    ),
    (
        "mod arity",
        lambda: torchhal.attention(q(), q(), q(), score_mod=lambda s, b: s),
        "score, b, h, q_idx, kv_idx",
    ),  # type: ignore[arg-type, misc]
    (
        "varlen rank",
        lambda: torchhal.varlen_attention(q(), q(), q(), lens(0, 5), lens(0, 5)),
        "varlen attention expects query .T, Hq, E.",
    ),
    (
        "varlen type",
        lambda: varlen(lens(0, 5).long(), lens(0, 5)),
        r"cu_seqlens_q expects an int32 tensor \(B \+ 1,\) and got torch.int64",
    ),
    (
        "varlen count",
        lambda: varlen(lens(0, 5), lens(0, 2, 5)),
        "count the same sequences, and have 2 and 3 entries",
    ),
    ("varlen empty", lambda: varlen(lens(), lens()), "at least the leading 0, and is empty"),
    (
        "page table",
        lambda: paged(page_table=torch.zeros(2, 3)),
        r"page_table expects an int32 tensor \(B, max_pages\) and got torch.float32",
    ),
    (
        "page rows",
        lambda: paged(page_table=torch.zeros(3, 3, dtype=torch.int32)),
        "query has batch size 2 and page_table 3",
    ),
    ("page size", lambda: paged(pages=q(6, 4, 0, 8)), "key_pages has a page size of 0"),
]


def lens(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def varlen(first: torch.Tensor, second: torch.Tensor) -> Any:
    return torchhal.varlen_attention(q(5, 4, 8), q(5, 4, 8), q(5, 4, 8), first, second)


def paged(page_table: torch.Tensor | None = None, pages: torch.Tensor | None = None) -> Any:
    pages = q(6, 4, 2, 8) if pages is None else pages
    table = torch.zeros(2, 3, dtype=torch.int32) if page_table is None else page_table
    return torchhal.paged_attention(q(), pages, pages, table, lens(5, 5))


@pytest.mark.parametrize(("call", "message"), [m[1:] for m in MISUSES], ids=[m[0] for m in MISUSES])
def test_each_misuse_is_told_what_was_expected_and_what_arrived(
    call: Callable[[], Any], message: str
) -> None:
    with pytest.raises(InvalidProblem, match=message):
        call()


def test_an_uncapturable_mod_is_told_the_operation_and_the_line() -> None:
    def mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if score > 0:
            return score
        return -score

    with pytest.raises(CaptureError) as caught:
        torchhal.attention(q(), q(), q(), score_mod=mod)
    assert "test_attention.py" in str(caught.value)
    assert "if score > 0" in str(caught.value)
    assert "torch.where" in str(caught.value)


def test_a_block_mask_for_other_lengths_is_refused_with_both() -> None:
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 5, 6, device="cpu")
    with pytest.raises(
        InvalidProblem, match="made for 5 queries and 6 keys, and the call has 5 queries and 5 keys"
    ):
        torchhal.attention(q(), q(), q(), block_mask=mask)


def test_one_key_batch_serves_every_query_batch() -> None:
    query, key = q(3, 4, 5, 8), q(1, 4, 6, 8)
    together = torchhal.attention(query, key, key)
    apart = torchhal.attention(query, key.expand(3, -1, -1, -1), key.expand(3, -1, -1, -1))
    assert torch.equal(together, apart)  # type: ignore[arg-type]


def jagged(*lengths: int, grad: bool = False) -> torch.Tensor:
    rows = [torch.randn(n, 4, 8, requires_grad=grad) for n in lengths]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged).transpose(1, 2)


def test_nested_sequences_give_what_each_gives_alone() -> None:
    query = jagged(3, 0, 5)
    out, lse = torchhal.attention(query, query, query, is_causal=True, return_lse=True)
    assert out.is_nested
    assert lse.shape[:2] == (3, 4)
    for rows, result in zip(query.transpose(1, 2).unbind(), out.transpose(1, 2).unbind(), strict=True):
        alone = rows.transpose(0, 1).unsqueeze(0)
        expected = torchhal.attention(alone, alone, alone, is_causal=True)
        torch.testing.assert_close(result, expected[0].transpose(0, 1))  # type: ignore[index]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda n: torchhal.attention(n, q(), q()),
            "query is a nested jagged tensor, so key has to be one too",
        ),
        (
            lambda n: torchhal.attention(n, n, jagged(3, 1, 4)),
            "key and value are nested with different lengths",
        ),
        (
            lambda n: torchhal.attention(n, n, n, attn_mask=q(5, 5)),
            "say it as a mask_mod of torchhal.varlen_attention",
        ),
        (lambda n: torchhal.attention(n.transpose(1, 2), n, n), "has to be ragged in dimension 2"),
    ],
)
def test_nested_misuse_is_told_what_to_do(call: Callable[[torch.Tensor], Any], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        call(jagged(3, 0, 5))
