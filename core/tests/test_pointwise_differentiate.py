"""Gradient graphs agree with torch autograd, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchhal.pointwise import PRIMITIVES, Graph, capture, differentiate, evaluate
from torchhal.pointwise.derivatives import DERIVATIVES, NON_DIFFERENTIABLE

F64 = torch.float64
N = 17
BINARY: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "max": torch.maximum, "min": torch.minimum, "atan2": torch.atan2, "mod": torch.remainder, "fmod": torch.fmod,
    "where": lambda a, b: torch.where(a > b, a, b * 2), "pow": lambda a, b: torch.pow(a.abs() + 0.5, b),
    "clamp_min": lambda a, b: torch.clamp(a, min=b), "clamp_max": lambda a, b: torch.clamp_max(a, 0.25) + b,
    "floor": lambda a, b: torch.floor(a) * b, "gelu": lambda a, b: torch.nn.functional.gelu(a) - b,
    "detach": lambda a, b: a.detach() * b,
}  # fmt: skip
UNARY: dict[str, Callable[..., Any]] = {
    name: getattr(torch, name)
    for name in [
        "exp", "exp2", "expm1", "sin", "cos", "tan", "atan", "sinh", "cosh", "tanh", "asinh", "sigmoid",
        "erf", "erfc", "abs", "neg", "relu", "sign",
    ]
} | {
    "log": lambda a: torch.log(a.abs() + 1), "log2": lambda a: torch.log2(a.abs() + 1),
    "log10": lambda a: torch.log10(a.abs() + 1), "log1p": lambda a: torch.log1p(a.abs()),
    "sqrt": lambda a: torch.sqrt(a.abs() + 1), "rsqrt": lambda a: torch.rsqrt(a.abs() + 1),
    "reciprocal": lambda a: torch.reciprocal(a.abs() + 1), "asin": lambda a: torch.asin(torch.tanh(a) * 0.9),
    "acos": lambda a: torch.acos(torch.tanh(a) * 0.9), "atanh": lambda a: torch.atanh(torch.tanh(a) * 0.9),
    "acosh": lambda a: torch.acosh(a.abs() + 1.5), "erfinv": lambda a: torch.erfinv(torch.tanh(a) * 0.9),
    "square": lambda a: a**2, "cube": lambda a: a**3, "clamp": lambda a: a.clamp(-0.5, 0.5),
}  # fmt: skip
STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(BINARY) + sorted(UNARY)), st.integers(0, 20), st.integers(0, 20)),
    min_size=1,
    max_size=6,
)


def backward(
    graph: Graph, inputs: list[Any], tensors: list[Any], seeds: list[Any]
) -> tuple[list[Any], list[Any]]:
    """Gradients of inputs and captured tensors by running the gradient graph and scatter-adding."""
    made = differentiate(graph)
    outs = evaluate(made.graph, [*inputs, *seeds], tensors)
    shape = torch.broadcast_shapes(*(seed.shape for seed in seeds), *(x.shape for x in inputs))
    grads = [outs[k].expand(shape) for k in range(len(made.inputs))]
    sums = [torch.zeros_like(t) for t in tensors]
    for part in made.contributions:
        indices = tuple(outs[i].long().expand(shape) for i in part.indices)
        if indices:
            sums[part.captured].index_put_(indices, outs[part.value].expand(shape), accumulate=True)
        else:
            sums[part.captured] += outs[part.value].expand(shape).sum()
    return grads, sums


@settings(max_examples=80, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 99))
def test_gradients_of_random_expressions_equal_autograd(steps: list[tuple[str, int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y, table = (torch.randn(N, generator=generator, dtype=F64).requires_grad_() for _ in range(3))
    scale = torch.randn((), generator=generator, dtype=F64).requires_grad_()
    where = torch.randint(-N, N, (N,), generator=generator)

    def program(x: Any, y: Any, i: Any) -> Any:
        pool = [x, y, table[i], scale]
        for name, a, b in steps:
            left, right = pool[a % len(pool)], pool[b % len(pool)]
            pool.append(BINARY[name](left, right) if name in BINARY else UNARY[name](left))
        return pool[-1] + x * 0, pool[-2] * y

    expected = program(x, y, where)
    seeds = [torch.randn(N, generator=generator, dtype=F64) for _ in expected]
    leaves = [x, y, table, scale]
    wanted = torch.autograd.grad(expected, leaves, seeds, allow_unused=True)
    assume(all(g is None or float(g.abs().max()) < 1e8 for g in wanted))
    captured = capture(program, [("x", F64), ("y", F64), ("i", torch.int64)])
    tensors = [t.detach() for t in captured.tensors]
    grads, sums = backward(captured.graph, [x.detach(), y.detach(), where], tensors, seeds)
    # What the function computed from plain tensors (scale.abs()) is captured with its autograd history.
    live = [(t, g) for t, g in zip(captured.tensors, sums, strict=True) if t.requires_grad]
    through: Any = (None, None)
    if live:
        through = torch.autograd.grad(
            [t for t, _ in live], [table, scale], [g for _, g in live], allow_unused=True
        )
    for leaf, gradient, ours in zip(leaves, wanted, (*grads, *through), strict=True):
        truth, found = (torch.zeros_like(leaf) if g is None else g for g in (gradient, ours))
        torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-9)


def test_evaluation_passes_gradcheck_for_inputs_and_captured_tensors() -> None:
    def mod(score: Any, q: Any) -> Any:
        return torch.tanh(score * bias[q, -1]) + bias[0, q] * scale

    bias = torch.randn(3, 3, dtype=F64, requires_grad=True)
    scale = torch.randn((), dtype=F64, requires_grad=True)
    captured = capture(mod, [("score", F64), ("q", torch.int32)])
    score, q = torch.randn(4, 3, dtype=F64, requires_grad=True), torch.arange(3, dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda s, *t: evaluate(captured.graph, [s, q], t), (score, *captured.tensors)
    )


def gradient_at(fn: Callable[..., Any], *points: float) -> list[float]:
    names = [(f"x{i}", F64) for i in range(len(points))]
    inputs = [torch.tensor([point], dtype=F64) for point in points]
    grads, _ = backward(capture(fn, names).graph, inputs, [], [torch.ones(1, dtype=F64)])
    return [float(g) for g in grads]


@pytest.mark.parametrize(
    ("fn", "points"),
    [
        (torch.relu, (0.0,)),
        (torch.abs, (0.0,)),
        (torch.maximum, (2.0, 2.0)),
        (torch.minimum, (2.0, 2.0)),
        (lambda x: torch.clamp(x, -1.0, 1.0), (1.0,)),
        (lambda x: torch.clamp(x, -1.0, 1.0), (-1.0,)),
        (lambda x: torch.clamp(x, 2.0, 1.0), (1.5,)),
        (torch.clamp_min, (2.0, 2.0)),
        (torch.clamp_max, (2.0, 2.0)),
        (torch.clamp_min, (float("nan"), 2.0)),
        (lambda x: x**0.5, (0.0,)),
        (lambda x: torch.pow(x, 0), (0.0,)),
        (lambda x, y: torch.pow(x, y), (0.0, 2.0)),
        (torch.nn.functional.logsigmoid, (0.0,)),
        (torch.nn.functional.hardtanh, (1.0,)),
        (torch.nn.functional.hardswish, (-3.0,)),
        (torch.nn.functional.softplus, (500.0,)),
        (torch.nn.functional.silu, (-1000.0,)),
        (torch.nn.functional.elu, (1000.0,)),
    ],
)
def test_gradients_at_kinks_and_extremes_follow_autograd(
    fn: Callable[..., Any], points: tuple[float, ...]
) -> None:
    leaves = [torch.tensor([point], dtype=F64, requires_grad=True) for point in points]
    wanted = [float(g) for g in torch.autograd.grad(fn(*leaves).sum(), leaves)]
    assert gradient_at(fn, *points) == pytest.approx(wanted, nan_ok=True)


def test_every_primitive_has_a_derivative_or_is_declared_without_one() -> None:
    assert set(DERIVATIVES) | NON_DIFFERENTIABLE == set(PRIMITIVES)
    assert not set(DERIVATIVES) & NON_DIFFERENTIABLE


def test_a_gradient_graph_keeps_signature_and_captured_tensors_and_names_its_new_inputs() -> None:
    table = torch.ones(3)
    graph = capture(lambda s, q: (s * table[q], q, s > 0), [("s", torch.float32), ("q", torch.int32)]).graph
    made = differentiate(graph)
    assert [name for name, _ in made.graph.inputs] == ["s", "q", "grad_0"]
    assert made.graph.captured == graph.captured
    assert made.output_grads == (0,) and made.inputs == (0,)
    (part,) = made.contributions
    assert (part.captured, part.indices, part.value) == (0, (1,), 2)


def test_an_input_that_no_floating_output_needs_has_gradient_zero() -> None:
    graph = capture(lambda s: s > 0, [("s", torch.float32)]).graph
    (zero,) = evaluate(differentiate(graph).graph, [torch.ones(3)])
    assert float(zero) == 0.0


def test_a_cast_rounds_the_gradient_to_the_dtype_it_came_from() -> None:
    x, seed = torch.rand(5, dtype=torch.float32), torch.rand(5, dtype=F64)
    graph = capture(lambda x: x.double() * 3, [("x", torch.float32)]).graph
    (gradient,) = evaluate(differentiate(graph).graph, [x, seed])
    assert torch.equal(gradient, (seed * 3).float())


def test_second_derivatives_come_from_differentiating_twice() -> None:
    once = differentiate(capture(lambda x: torch.sin(x) * x, [("x", F64)]).graph).graph
    x, one = torch.tensor([0.7], dtype=F64), torch.ones(1, dtype=F64)
    second = evaluate(differentiate(once).graph, [x, one, one])[0]
    torch.testing.assert_close(second, 2 * torch.cos(x) - x * torch.sin(x))
