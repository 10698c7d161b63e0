"""Reductions over lists: torch's numbers for every type, of nothing and of NaN too, and a message for misuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchhal import foreach_any_nonfinite, foreach_norm, foreach_reduce
from torchhal.errors import InvalidProblem
from torchhal.selection import routes

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool]
SIZES = st.lists(st.sampled_from([(), (0,), (3,), (2, 0), (17,), (5, 7), (1031,)]), min_size=1, max_size=4)
few = settings(max_examples=40, deadline=None)


def drawn(sizes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, generator=generator) * 4).to(dtype) for size in sizes]


@few
@given(sizes=SIZES, dtype=st.sampled_from(TYPES), seed=st.integers(0, 99), total=st.booleans())
def test_sums_are_those_of_float64_and_of_integers_exact(
    sizes: list[tuple[int, ...]], dtype: torch.dtype, seed: int, total: bool
) -> None:
    xs = drawn(sizes, dtype, seed)
    exact = [math.fsum(x.flatten().tolist()) for x in xs]
    kind = (
        torch.int64
        if not dtype.is_floating_point
        else torch.float64
        if dtype is torch.float64
        else torch.float32
    )
    found = foreach_reduce(lambda x: x, xs, total=total)
    size = sum(float(x.double().abs().sum()) for x in xs)
    for value, wanted in [(found, sum(exact))] if total else zip(found, exact, strict=True):
        assert value.shape == () and value.dtype is kind
        eps = 0.0 if kind is torch.int64 else torch.finfo(kind).eps
        assert abs(value.item() - wanted) <= 2 * eps * (size if total else abs(wanted)) + 1e-13 * size * (
            eps > 0
        )


@few
@given(sizes=SIZES, dtype=st.sampled_from(TYPES), seed=st.integers(0, 99), nan=st.booleans())
def test_the_largest_and_any_are_torchs(
    sizes: list[tuple[int, ...]], dtype: torch.dtype, seed: int, nan: bool
) -> None:
    xs = drawn(sizes, dtype, seed)
    if nan and dtype.is_floating_point and xs[-1].numel():
        xs[-1].view(-1)[-1] = float("nan")
    least = (
        -torch.inf if dtype.is_floating_point else False if dtype is torch.bool else torch.iinfo(dtype).min
    )
    for x, largest, some in zip(
        xs,
        foreach_reduce(lambda x: x, xs, reduction="max"),
        foreach_reduce(lambda x: x, xs, reduction="any"),
        strict=True,
    ):
        wanted = x.max() if x.numel() else torch.tensor(least, dtype=dtype)
        assert largest.dtype is dtype and torch.allclose(largest, wanted, 0, 0, equal_nan=True)
        assert some.dtype is torch.bool and bool(some) == bool((x != 0).any())


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_norms_are_torchs_each_and_together(order: float) -> None:
    xs = [
        torch.randn(40, dtype=torch.float64),
        torch.randn(3, 5, dtype=torch.float64),
        torch.randn(0, dtype=torch.float64),
    ]
    for found, x in zip(foreach_norm(xs, order), xs, strict=True):
        wanted = torch.linalg.vector_norm(x, order) if x.numel() else x.new_zeros(())
        assert torch.allclose(found, wanted, rtol=1e-14)
    whole = torch.cat([x.flatten() for x in xs])
    assert torch.allclose(
        foreach_norm(xs, order, total=True), torch.linalg.vector_norm(whole, order), rtol=1e-14
    )


def test_the_norm_of_half_types_does_not_overflow() -> None:
    xs = [torch.full((9,), 300.0, dtype=torch.float16)]
    assert foreach_norm(xs)[0].item() == 900.0


def test_clipping_is_two_passes() -> None:
    grads = [torch.full((4,), 3.0), torch.full((5,), 4.0)]
    norm = foreach_norm(grads, total=True)
    assert math.isclose(norm.item(), math.sqrt(36 + 80), rel_tol=1e-6)


def test_types_may_vary_along_the_lists_and_a_total_takes_the_widest() -> None:
    xs = [torch.ones(3, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64)]
    assert [t.dtype for t in foreach_reduce(lambda x: x * 2, xs)] == [torch.float32, torch.float64]
    total = foreach_reduce(lambda x: x * 2, xs, total=True)
    assert total.dtype is torch.float64 and total.item() == 10.0


def test_a_total_of_integers_of_several_types_is_exact() -> None:
    xs = [torch.tensor([2**53 + 1]), torch.tensor([5], dtype=torch.int32)]
    total = foreach_reduce(lambda x: x * 1, xs, reduction="max", total=True)
    assert total.dtype is torch.int64 and total.item() == 2**53 + 1


def test_several_results_are_reduced_each() -> None:
    sums, products = foreach_reduce(lambda x, y: (x + y, x * y), [torch.ones(3)], [torch.full((3,), 2.0)])
    assert (sums[0].item(), products[0].item()) == (9.0, 6.0)
    assert isinstance(foreach_reduce(lambda x: (x, -x), [torch.ones(3)], total=True), tuple)


def test_not_finite_is_found_wherever_it_is() -> None:
    clean = [torch.ones(100), torch.zeros(0), torch.ones(3, dtype=torch.int32)]
    assert not foreach_any_nonfinite(clean)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for position in (0, 57, 99):
            xs = [torch.ones(100), torch.ones(100)]
            xs[1][position] = bad
            assert foreach_any_nonfinite(xs)


def test_nothing_reduces_to_the_start() -> None:
    assert foreach_reduce(lambda x: x, []) == [] and foreach_norm([]) == []
    assert foreach_reduce(lambda x: x, [], total=True).item() == 0.0
    assert foreach_norm([], math.inf, total=True).item() == 0.0
    assert not foreach_any_nonfinite([])


def test_results_have_memory_of_their_own() -> None:
    found = foreach_reduce(lambda x: x, [torch.ones(3), torch.ones(4)])
    found[0].add_(1.0)
    assert found[1].item() == 4.0
    assert len({t.untyped_storage().data_ptr() for t in found}) == 2


def test_gradients_reach_operands_through_sums_and_largest() -> None:
    for reduction, wanted in (("sum", [2.0, 4.0, 4.0]), ("max", [0.0, 2.0, 2.0])):
        x = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64, requires_grad=True)
        (found,) = foreach_reduce(lambda x: x * x, [x], reduction=reduction)
        found.backward()
        assert x.grad is not None and x.grad.tolist() == wanted


def test_it_is_one_node_under_torch_compile() -> None:
    def call(*xs: Tensor) -> Any:
        return foreach_norm(list(xs), total=True), foreach_reduce(torch.sin, list(xs))

    xs = [torch.randn(5), torch.randn(2, 3)]
    total, parts = torch.compile(call, backend="aot_eager", fullgraph=True)(*xs)
    assert torch.allclose(total, foreach_norm(xs, total=True))
    assert torch.allclose(torch.stack(list(parts)), torch.stack(foreach_reduce(torch.sin, xs)))


def test_another_length_makes_no_other_plan() -> None:
    foreach_norm([torch.ones(3)])
    before = len(routes())
    foreach_norm([torch.ones(4)] * 9)
    assert len(routes()) == before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: foreach_reduce(lambda x: x, [torch.ones(1)], reduction="mean"),
            "sum, max, any, and got 'mean'",
        ),
        (lambda: foreach_reduce(lambda x: x, [torch.ones(1)], out=[]), "takes no out"),
        (lambda: foreach_norm([torch.ones(1)], 3.0), "orders 1, 2 and inf, and got 3.0"),
        (lambda: foreach_norm([torch.ones(1, dtype=torch.int32)]), "floating tensors and got torch.int32"),
        (lambda: foreach_reduce(lambda x, y: x, [torch.ones(1)], []), "one length"),
    ],
)
def test_misuse_is_refused_in_words(call: Any, words: str) -> None:
    with pytest.raises(InvalidProblem, match=words):
        call()
