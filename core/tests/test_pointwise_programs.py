"""Random programs: a captured graph computes the very bits that the function computes on tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchhal.errors import CaptureError
from torchhal.pointwise import Graph, capture, evaluate

N = 33
BINARY: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "logical_and": torch.logical_and,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmod": torch.fmod,
    "atan2": torch.atan2,
    "fmax": torch.fmax,
    "div_trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "clamp_min": lambda a, b: torch.clamp(a, min=b),
    "clamp_max": lambda a, b: torch.clamp(a, max=b),
}
UNARY: dict[str, Callable[..., Any]] = {
    "neg": lambda a: -a,
    "abs": abs,
    "invert": lambda a: ~a,
    "not": torch.logical_not,
    "float": lambda a: a.float(),
    "half": lambda a: a.to(torch.float16),
    "bf16": lambda a: a.bfloat16(),
    "double": lambda a: a.to(dtype=torch.float64),
    "bool": lambda a: a.bool(),
    "square": lambda a: a**2,
    "cube": lambda a: torch.pow(a, 3),
    "root": lambda a: a**0.5,
    "exp2 of number": lambda a: 2.0**a,
    "inverse": lambda a: 3.0 / a,
    "from one": lambda a: 1 - a,
    "zeros_like": torch.zeros_like,
    "full_like": lambda a: torch.full_like(a, 2),
    "relu": torch.nn.functional.relu,
}
FLOAT_UNARY = [
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos",
    "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "sigmoid", "erf",
    "erfc", "erfinv", "floor", "ceil", "round", "trunc", "isnan", "isinf", "isfinite", "sign",
]  # fmt: skip
UNARY |= {name: getattr(torch, name) for name in FLOAT_UNARY}
NUMBERS = (0, 1, -3, 7, 0.1, -1.7, 0.5, 2.0, 1e-3, float("inf"))
LANES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.int64,
    torch.int8,
    torch.bool,
)


def sample(dtype: torch.dtype, seed: int, shape: tuple[int, ...] = (N,)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * 2).to(dtype)
    return torch.randint(-9, 10, shape, generator=generator).to(dtype)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype is right.dtype
        and torch.equal(torch.nan_to_num(left, nan=12345.0), torch.nan_to_num(right, nan=12345.0))
        and torch.equal(torch.isnan(left), torch.isnan(right))
    )


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(BINARY)),
    left=st.sampled_from(LANES),
    right=st.one_of(
        st.sampled_from(LANES), st.sampled_from(LANES).map(lambda d: (d, "0-dim")), st.sampled_from(NUMBERS)
    ),
    swap=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_binary_function_promotes_and_computes_as_torch_does(
    name: str, left: torch.dtype, right: Any, swap: bool, seed: int
) -> None:
    lane = sample(left, seed)
    fn = BINARY[name]
    if isinstance(right, torch.dtype):
        inputs, tensors, other = [("x", left), ("y", right)], [lane, sample(right, seed + 1)], None
    else:
        zero_dim = isinstance(right, tuple)
        other = sample(right[0], seed + 1, ()) if zero_dim else right
        inputs, tensors = [("x", left)], [lane]

    def user(*args: Any) -> Any:
        pair = args if len(args) == 2 else (args[0], other)
        return fn(*reversed(pair)) if swap else fn(*pair)

    try:
        expected = user(*tensors)
    except (RuntimeError, TypeError, ZeroDivisionError, NotImplementedError):
        assume(False)
    assume(isinstance(expected, torch.Tensor))
    captured = capture(user, inputs)
    (result,) = evaluate(captured.graph, tensors, captured.tensors)
    assert same_bits(result.expand(N), expected.expand(N)), (captured.graph, result, expected)


@settings(max_examples=120, deadline=None)
@given(name=st.sampled_from(sorted(UNARY)), dtype=st.sampled_from(LANES), seed=st.integers(0, 99))
def test_every_unary_function_promotes_and_computes_as_torch_does(
    name: str, dtype: torch.dtype, seed: int
) -> None:
    lane = sample(dtype, seed)
    try:
        expected = UNARY[name](lane)
    except (RuntimeError, TypeError, NotImplementedError):
        assume(False)
    captured = capture(lambda x: UNARY[name](x), [("x", dtype)])
    (result,) = evaluate(captured.graph, [lane], captured.tensors)
    assert same_bits(result.expand(N), expected), (captured.graph, result, expected)


class Program:
    """A straight-line function over a pool of operands; runs on tensors and on recorded values alike."""

    def __init__(self, steps: list[tuple[str, int, int]], extras: list[Any]) -> None:
        self.steps = steps
        self.extras = extras

    def __call__(self, *lanes: Any) -> Any:
        pool: list[Any] = [*lanes, *self.extras]
        results: list[Any] = list(lanes)
        for name, i, j in self.steps:
            left = results[i % len(results)]
            made = BINARY[name](left, pool[j % len(pool)]) if name in BINARY else UNARY[name](left)
            results.append(made)
            pool.append(made)
        return results[-1], results[-2]


STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(BINARY) + sorted(UNARY)), st.integers(0, 30), st.integers(0, 30)),
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, dtypes=st.lists(st.sampled_from(LANES), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_random_programs_compute_the_same_bits_captured_and_run(
    steps: list[tuple[str, int, int]], dtypes: list[torch.dtype], seed: int
) -> None:
    lanes = [sample(dtype, seed + i) for i, dtype in enumerate(dtypes)]
    program = Program(steps, [sample(torch.float32, seed + 7, ()), sample(torch.int64, seed + 8, ()), 0.3, 2])
    try:
        expected = program(*lanes)
    except (RuntimeError, TypeError, ZeroDivisionError, NotImplementedError):
        assume(False)
    captured = capture(program, [(f"x{i}", dtype) for i, dtype in enumerate(dtypes)])
    assert captured.structure == "tuple"
    results = evaluate(captured.graph, lanes, captured.tensors)
    for result, wanted in zip(results, expected, strict=True):
        assert same_bits(result.expand(N), wanted.expand(N)), (captured.graph, result, wanted)
    again = Graph.from_text(captured.graph.to_text())
    assert again == captured.graph
    assert hash(again) == hash(captured.graph)
    assert again.digest == captured.graph.digest


ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "softplus": lambda x: torch.nn.functional.softplus(x, beta=2.0, threshold=3.0),
    "mish": torch.nn.functional.mish,
    "logsigmoid": torch.nn.functional.logsigmoid,
    "elu": lambda x: torch.nn.functional.elu(x, 0.7),
    "selu": torch.selu,
    "celu": lambda x: torch.celu(x, 1.3),
    "leaky_relu": lambda x: torch.nn.functional.leaky_relu(x, 0.2),
    "relu6": torch.nn.functional.relu6,
    "hardtanh": lambda x: torch.nn.functional.hardtanh(x, -0.5, 0.7),
    "hardsigmoid": torch.nn.functional.hardsigmoid,
    "hardswish": torch.nn.functional.hardswish,
    "softsign": torch.nn.functional.softsign,
    "tanhshrink": torch.nn.functional.tanhshrink,
    "threshold": lambda x: torch.nn.functional.threshold(x, 0.2, 5.0),
    "frac": torch.frac,
    "logaddexp": lambda x: torch.logaddexp(x, x * 0.5),
    "hypot": lambda x: torch.hypot(x, x + 1),
    "lerp": lambda x: torch.lerp(x, x * 3, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x + 2, value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.abs() + 2, value=0.5),
    "nan_to_num": lambda x: torch.nan_to_num(x / (x - x.round()), nan=1.0, posinf=9.0),
    "deg2rad": torch.deg2rad,
    "masked_fill": lambda x: x.masked_fill(x > 0, -1.0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_composite_functions_agree_with_torch_and_so_do_their_gradients(
    name: str, dtype: torch.dtype
) -> None:
    x = (
        torch.cat([torch.linspace(-30, 30, 121), torch.tensor([-3.0, 0.0, 3.0, 6.0])])
        .to(dtype)
        .requires_grad_()
    )
    fn = ACTIVATIONS[name]
    captured = capture(lambda x: fn(x), [("x", dtype)])
    (result,) = evaluate(captured.graph, [x], captured.tensors)
    expected = fn(x)
    bound = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(result, expected, rtol=bound, atol=bound, equal_nan=True)
    if dtype is torch.float64:
        (ours,) = torch.autograd.grad(result.sum(), x)
        (theirs,) = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_a_program_of_a_thousand_steps_is_captured_without_recursion() -> None:
    def deep(x: Any) -> Any:
        for i in range(3000):
            x = torch.sin(x) + i
        return x

    x = sample(torch.float64, 0)
    graph = capture(deep, [("x", torch.float64)]).graph
    assert torch.equal(evaluate(graph, [x])[0], deep(x))
    assert Graph.from_text(graph.to_text()) == graph


def test_an_uncapturable_step_in_a_program_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match="cumsum"):
        capture(lambda x: torch.cumsum(x, 0), [("x", torch.float32)])
