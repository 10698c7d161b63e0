"""How FlashAttention-4 is called, with plain functions in the place of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import torchhal
from torchhal.errors import BackendWarning
from torchhal.problems import AttentionProblem
from torchhal_cuda128 import fa4

FULL = AttentionProblem(
    torch.device("cuda", 0),
    query_dtype=torch.bfloat16,
    key_dtype=torch.bfloat16,
    value_dtype=torch.bfloat16,
    head_size=128,
    value_head_size=128,
)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Plain attention of (B, H, L, E), aligned at the bottom right as FlashAttention-4 is; output and LSE."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.mT * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + key.shape[2] - query.shape[2])
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace its two functions by plain ones with their arguments, (B, L, H, E); returns what they are called with."""
    calls: list[dict[str, Any]] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> None:
        calls.append(rest)
        out, lse = attend(*(t.transpose(1, 2) for t in (q, k, v)), rest["softmax_scale"], rest["causal"])
        rest["out"].copy_(out.transpose(1, 2))
        if rest["lse"] is not None:
            rest["lse"].copy_(lse)

    def backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, **rest: Any
    ) -> None:
        calls.append(rest)
        leaves = [t.transpose(1, 2).detach().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            ends = attend(*leaves, rest["softmax_scale"], rest["causal"])
            above = [dout.transpose(1, 2), torch.zeros_like(lse) if rest["dlse"] is None else rest["dlse"]]
            found = torch.autograd.grad(ends, leaves, above)
        for name, gradient in zip(("dq", "dk", "dv"), found, strict=True):
            rest[name].copy_(gradient.transpose(1, 2))

    monkeypatch.setattr(fa4, "_functions", lambda: (forward, backward))
    monkeypatch.setattr(fa4, "_usable", lambda: True)
    return calls


@pytest.mark.parametrize(
    ("rows", "keys", "causal"), [(6, 6, True), (6, 9, True), (6, 9, False), (9, 6, False)]
)
@pytest.mark.parametrize("with_lse", [False, True])
def test_its_results_are_those_of_the_specification_at_any_lengths(
    monkeypatch: pytest.MonkeyPatch, rows: int, keys: int, causal: bool, with_lse: bool
) -> None:
    calls = stand_in(monkeypatch)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, n, 8) for h, n in ((4, rows), (2, keys), (2, keys)))
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    problem = replace(FULL, is_causal=causal, return_lse=with_lse)
    out, lse = fa4.engine(problem, 4).forward(query, key, value, 0.3)
    exact, its_lse = torchhal.attention(
        query, key, value, is_causal=causal, scale=0.3, enable_gqa=True, return_lse=True, backend="reference"
    )
    torch.testing.assert_close(out, exact)
    assert out.stride() == query.stride()
    if with_lse:
        torch.testing.assert_close(lse, its_lse)
    assert lse.numel() == (2 * 4 * rows if with_lse else 0)
    assert calls[0]["num_splits"] == 1 and calls[0]["return_lse"] is with_lse


@pytest.mark.parametrize(("rows", "keys", "causal"), [(6, 6, True), (6, 9, True), (6, 9, False)])
@pytest.mark.parametrize("through_lse", [False, True])
def test_its_gradients_are_deterministic_those_of_autograd_and_zero_for_keys_that_no_row_sees(
    monkeypatch: pytest.MonkeyPatch, rows: int, keys: int, causal: bool, through_lse: bool
) -> None:
    calls = stand_in(monkeypatch)
    torch.manual_seed(0)
    leaves = [torch.randn(2, h, n, 8, requires_grad=True) for h, n in ((4, rows), (2, keys), (2, keys))]
    ends = torchhal.attention(
        *leaves, is_causal=causal, scale=0.3, enable_gqa=True, return_lse=True, backend="reference"
    )
    above, lse_above = torch.randn(2, 4, rows, 8), torch.randn(2, 4, rows) if through_lse else None
    given = [above, torch.zeros(2, 4, rows) if lse_above is None else lse_above]
    expected = torch.autograd.grad(ends, leaves, given)  # type: ignore[arg-type]
    backward = fa4.engine(replace(FULL, is_causal=causal), 4).backward
    assert backward is not None
    tensors = [t.detach() for t in leaves]
    found = backward(*tensors, 0.3, *(t.detach() for t in ends), above, lse_above)
    for got, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(got, truth)
    if causal and keys > rows:
        assert not found[1][:, :, rows:].any() and not found[2][:, :, rows:].any()
    assert calls[-1]["deterministic"] is True


def test_a_package_that_does_not_import_is_named_once_and_the_kernels_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for function in (fa4._usable, fa4._functions):
        function.cache_clear()
    monkeypatch.setattr(fa4, "MODULE", "flash_attn_that_is_not_there")
    serves = fa4.engine(FULL, 4).serves
    tensor = torch.zeros(1, 2, 4, 8)
    with pytest.warns(
        BackendWarning, match="fails to import, and the Triton kernels serve instead; install it again"
    ):
        assert not serves(tensor, tensor, 1.0)
    fa4._usable.cache_clear()
