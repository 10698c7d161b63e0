"""The portable kernels behind a faster engine that hides keys by a weight of 0, as fused kernels do, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import interpreted
import numpy as np
import pytest
import torch
from attention_calls import INF, NAN, qkv
from torch import Tensor

from torchhal.operands import AttentionOperands
from torchhal.portable import attention
from torchhal.portable.engine import Engine
from torchhal.portable.tiles import PLAIN
from torchhal.problems import AttentionProblem

FLOAT = torch.float32
SCALE = 0.25
DEVICE = interpreted.DEVICE
Run = Callable[..., tuple[Tensor, Tensor]]


def leaky(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and LSE; every value is multiplied by a weight, hidden ones by 0."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.mT * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -INF)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def engine(causal: bool, mark: float = 1.0, backward: bool = True, least: int = 0) -> Engine:
    """An engine whose results are ``mark`` times the truth, so that what it wrote can be told from what the kernels did."""

    def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = leaky(query, key, value, scale, causal)
        return out * mark, lse

    def pull(
        query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, lse: Tensor, above: Tensor, lse_above: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        with torch.enable_grad():
            found, its_lse = leaky(*leaves, scale, causal)  # type: ignore[arg-type]
            ends, given = ([found], [above]) if lse_above is None else ([found, its_lse], [above, lse_above])
            gradients = torch.autograd.grad(ends, leaves, given)
        return tuple(g * mark for g in gradients)  # type: ignore[return-value]

    return Engine(lambda query, key, scale: query.shape[2] >= least, forward, pull if backward else None)


def runs(query: Tensor, key: Tensor, causal: bool, using: Engine | None, gradients: bool = False) -> Run:
    problem = AttentionProblem(
        query.device, frozenset({"backward"} if gradients else ()), query_dtype=FLOAT, key_dtype=FLOAT, value_dtype=FLOAT,
        query_heads=query.shape[1], key_heads=key.shape[1], head_size=16, value_head_size=16, is_causal=causal,
        return_lse=True,
    )  # fmt: skip
    run = attention.runner(problem, PLAIN, using)

    def compute(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        with np.errstate(all="ignore"):
            found: tuple[Tensor, Tensor] = run(*tensors, None, SCALE, AttentionOperands())
        return found

    return compute


def tensors(rows: int = 40, keys: int = 40) -> list[Tensor]:
    return [t.to(DEVICE) for t in qkv(2, 2, 1, rows, keys, 16, 16, FLOAT)]


def test_a_finite_result_stays_as_the_engine_wrote_it_bit_for_bit() -> None:
    given = tensors()
    out, lse = runs(given[0], given[1], True, engine(True, mark=7.0))(*given)
    expected, its_lse = leaky(*given, SCALE, True)  # type: ignore[arg-type]
    assert torch.equal(out, expected * 7.0) and torch.equal(lse, its_lse)


def test_a_call_that_the_engine_does_not_serve_is_computed_by_the_kernels() -> None:
    given = tensors()
    out, _ = runs(given[0], given[1], True, engine(True, mark=7.0, least=41))(*given)
    torch.testing.assert_close(out, leaky(*given, SCALE, True)[0], rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("of", "wild"), [("key", NAN), ("key", INF), ("value", NAN), ("value", -INF)])
def test_what_a_hidden_key_holds_reaches_only_the_rows_that_see_it(wild: float, of: str) -> None:
    given = tensors()
    clean, clean_lse = leaky(*given, SCALE, True)  # type: ignore[arg-type]
    given[1 if of == "key" else 2][1, 0, 25, 3] = wild
    leaked = leaky(*given, SCALE, True)[0]  # type: ignore[arg-type]
    if of == "value":
        assert leaked[1, :2, :25].isnan().any(), "the engine has to leak for this to test anything"
    out, lse = runs(given[0], given[1], True, engine(True))(*given)
    exact, exact_lse = runs(given[0], given[1], True, None)(*given)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5, equal_nan=True)
    blind = torch.ones(out.shape[:3], dtype=torch.bool)
    blind[1, :2, 25:] = False
    torch.testing.assert_close(out[blind], clean[blind], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[blind], clean_lse[blind], rtol=1e-5, atol=1e-5)
    if of == "value":
        assert not out[1, :2, 25:, 3].isfinite().any()


def test_only_tiles_that_are_not_finite_are_computed_again() -> None:
    given = tensors(rows=70, keys=70)
    given[2][1, 0, 69, 3] = NAN
    out, _ = runs(given[0], given[1], True, engine(True, mark=7.0))(*given)
    rows = PLAIN.prefill(AttentionProblem(given[0].device, query_dtype=FLOAT)).rows
    whole, _ = leaky(*given, SCALE, True)  # type: ignore[arg-type]
    first = 69 // rows * rows
    assert 0 < first < 69
    # The engine leaked into every row of these heads, so all their tiles are mended; those of the other sequence stay marked.
    assert torch.equal(out[0], whole[0] * 7.0)
    exact, _ = runs(given[0], given[1], True, None)(*given)
    assert torch.equal(out[1, :2, :69], exact[1, :2, :69])


def test_where_nothing_is_hidden_the_engines_result_is_final() -> None:
    given = tensors(rows=40, keys=33)
    given[2][1, 0, 25, 3] = INF
    out, _ = runs(given[0], given[1], False, engine(False, mark=7.0))(*given)
    assert torch.equal(out, leaky(*given, SCALE, False)[0] * 7.0)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- gradients


def pulled(run: Run, given: list[Tensor], above: Tensor, lse_above: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    out, lse = run(*leaves)
    with np.errstate(all="ignore"):
        return list(torch.autograd.grad((out, lse), leaves, (above, lse_above)))


def above_of(given: list[Tensor]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn_like(given[0]), torch.randn(given[0].shape[:3]).to(given[0])


def test_finite_gradients_stay_as_the_engine_wrote_them_bit_for_bit() -> None:
    given = tensors()
    above = above_of(given)
    found = pulled(runs(given[0], given[1], True, engine(True, mark=7.0), True), given, *above)
    leaves = [t.detach().requires_grad_() for t in given]
    expected = torch.autograd.grad(leaky(*leaves, SCALE, True), leaves, above)  # type: ignore[arg-type]
    for got, truth in zip(found, expected, strict=True):
        assert torch.equal(got, truth * 7.0)


@pytest.mark.parametrize(("where", "wild"), [
    ("query", NAN), ("key", NAN), ("value", NAN), ("value", INF), ("above", INF),
])  # fmt: skip
def test_gradients_are_not_finite_where_the_kernels_alone_have_them_so_and_nowhere_else(
    where: str, wild: float
) -> None:
    given = tensors()
    above = above_of(given)
    (given[["query", "key", "value"].index(where)] if where != "above" else above[0])[1, 0, 25, 3] = wild
    found = pulled(runs(given[0], given[1], True, engine(True), True), given, *above)
    exact = pulled(runs(given[0], given[1], True, None, True), given, *above)
    for got, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_an_engine_without_a_backward_pass_leaves_gradients_to_the_kernels() -> None:
    given = tensors()
    above = above_of(given)
    found = pulled(runs(given[0], given[1], True, engine(True, backward=False), True), given, *above)
    exact = pulled(runs(given[0], given[1], True, None, True), given, *above)
    for got, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
