"""Functions of foreach as machine code, against the vector machine and torch; and calls that are served directly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import SETS, Tensor, forced, threads

import torchhal
from torchhal.errors import InvalidProblem
from torchhal.foreach_columns import LIST
from torchhal_cpu_x86 import maps

INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-40, -3e38, 0.5]
ONE = [
    torch.neg,
    torch.abs,
    torch.sign,
    torch.sqrt,
    torch.relu,
    torch.exp,
    lambda x: x * 0.3,
    lambda x: 2.0 - x,
]
TWO = [
    torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum,
    lambda x, y: torch.where(x > y, x, y * 2.0), lambda x, y: torch.where(x <= y, x, -y),
    lambda x, y: torch.where(x != y, x, 1.0), lambda x, y: torch.where(x == y, 0.0, y),
    lambda x, y: torch.where(x < y, 3.0, y), lambda x, y: torch.where(x >= y, x + y, y),
]  # fmt: skip


def bits(tensor: Tensor) -> Tensor:
    """Patterns of bits, one of them for every NaN."""
    width = torch.int64 if tensor.dtype is torch.float64 else torch.int32
    return torch.where(tensor.isnan(), torch.full_like(tensor, NAN), tensor).view(width)


@st.composite
def functions(draw: Any) -> Callable[..., Any]:
    """A random function of three values, two results."""
    steps = draw(
        st.lists(st.tuples(st.integers(0, 19), st.integers(0, 7), st.integers(0, 7)), min_size=2, max_size=10)
    )

    def function(x: Any, y: Any, s: Any) -> Any:
        values = [x, y, x * s, y + s]
        for kind, i, j in steps:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(ONE[kind](a) if kind < 8 else TWO[kind - 8](a, b))
        return x + values[-1], values[-2] * y

    return function


@pytest.mark.sanitized
@pytest.mark.skipif("avx512" not in SETS, reason="nothing is compiled without AVX-512")
@settings(max_examples=60, deadline=None)
@given(
    function=functions(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    size=st.sampled_from([1, 15, 48, 83]),
)
def test_machine_code_gives_the_bits_of_the_vector_machine(
    function: Callable[..., Any], dtype: torch.dtype, size: int
) -> None:
    generator = torch.Generator().manual_seed(size)
    xs, ys = ([torch.randn(size, generator=generator, dtype=dtype)] for _ in range(2))
    for tensor in (xs[0], ys[0]):
        places = torch.randint(len(SPECIAL), (size,), generator=generator)
        tensor.copy_(torch.where(places % 3 == 0, torch.tensor(SPECIAL, dtype=dtype)[places], tensor))
    found = {}
    for isa in ("avx2", "avx512"):
        with forced(isa, torch.float32):
            found[isa] = torchhal.foreach_map(function, xs, ys, 0.7, backend="cpu_x86")
    for one, other in zip(found["avx2"], found["avx512"], strict=True):
        assert torch.equal(bits(one[0]), bits(other[0]))


def test_a_function_of_more_values_than_there_are_registers_is_right() -> None:
    def wide(x: Tensor) -> Tensor:
        parts = [x * (0.5 + i) for i in range(40)]
        total, product = parts[0], parts[0]
        for part in parts[1:]:
            total = total + part
        for part in parts[1:]:
            product = product * (1.0 + part * 0.001)
        return total / product

    xs = [torch.rand(100)]
    assert torch.equal(torchhal.foreach_map(wide, xs, backend="cpu_x86")[0], wide(xs[0]))


# ---------------------------------------------------------------------------- served directly


def step(p: Any, g: Any, m: Any, rate: Any) -> Any:
    m = m * 0.5 + g
    return p - rate * m, m


def lists(count: int = 3, size: int = 33) -> list[list[Tensor]]:
    return [[torch.randn(size) for _ in range(count)] for _ in range(3)]


def run(p: list[Tensor], g: list[Tensor], m: list[Tensor], rate: float = 0.1) -> None:
    torchhal.foreach_map(step, p, g, m, rate, out=(p, m), backend="cpu_x86")


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call like it has been served, so the next may be served directly, and only so."""
    run(*lists())

    def closer(*arguments: Any) -> None:
        raise AssertionError("the call was not served directly")

    monkeypatch.setattr(maps, "run", closer)


@pytest.mark.usefixtures("known")
def test_direct_calls_take_new_numbers_lengths_and_sizes() -> None:
    for count, size, rate in ((1, 1, 0.3), (7, 100, 0.2), (2, 40000, 0.1)):
        p, g, m = lists(count, size)
        wanted = [step(*values, rate) for values in zip(p, g, m, strict=True)]
        run(p, g, m, rate)
        for found, held, (one, two) in zip(p, m, wanted, strict=True):
            assert torch.equal(found, one) and torch.equal(held, two)


@pytest.mark.usefixtures("known")
def test_direct_calls_follow_a_tensor_to_other_memory() -> None:
    p, g, m = lists()
    run(p, g, m)
    p[0].data, g[1].data, m[2].data = torch.ones(33), torch.ones(33), torch.ones(33)
    wanted = [step(*values, 0.1) for values in zip(p, g, m, strict=True)]
    run(p, g, m)
    assert all(torch.equal(found, one) for found, (one, _) in zip(p, wanted, strict=True))


@pytest.mark.usefixtures("known")
def test_direct_calls_tell_autograd_what_they_overwrote() -> None:
    p, g, m = lists()
    w = torch.ones(33, requires_grad=True)
    product = (w * p[1]).sum()
    run(p, g, m)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def overlapping(p: list[Tensor], g: list[Tensor], m: list[Tensor]) -> None:
    p[1] = p[0]


def shifted(p: list[Tensor], g: list[Tensor], m: list[Tensor]) -> None:
    buffer = torch.randn(40)
    p[0], g[0] = buffer[:33], buffer[4:37]


def sparse(p: list[Tensor], g: list[Tensor], m: list[Tensor]) -> None:
    g[2] = g[2].to_sparse()


def short(p: list[Tensor], g: list[Tensor], m: list[Tensor]) -> None:
    g.pop()


@pytest.mark.sanitized
@pytest.mark.parametrize("spoil", [overlapping, shifted, sparse, short])
def test_what_only_a_closer_look_shows_is_refused_and_nothing_is_written(spoil: Any) -> None:
    p, g, m = lists()
    run(p, g, m)
    spoil(p, g, m)
    before = [t.clone() for t in p]
    with pytest.raises(InvalidProblem):
        run(p, g, m)
    assert all(torch.equal(one, other) for one, other in zip(p, before, strict=True))


@pytest.mark.sanitized
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, None].expand(33, 2).t()[0],
        lambda x: torch.stack([x, x], 1)[:, 0],
        torch._neg_view,
        lambda x: x.double(),
    ],
)
def test_tensors_that_are_not_plain_memory_are_served_all_the_same(change: Any) -> None:
    p, g, m = lists()
    run(p, g, m)
    g[1] = change(g[1])
    wanted = [step(*values, 0.1) for values in zip(p, g, m, strict=True)]
    run(p, g, m)
    for found, held, (one, two) in zip(p, m, wanted, strict=True):
        assert torch.allclose(found, one.float()) and torch.allclose(held, two.float())


def test_a_call_of_tensors_without_dimensions_says_nothing_of_one_of_others() -> None:
    scalar = torch.tensor(1.0, dtype=torch.float64)

    def call(*xs: Tensor) -> list[torch.dtype]:
        return [t.dtype for t in torchhal.foreach_map(torch.add, list(xs), scalar, backend="cpu_x86")]

    none, some = torch.tensor(1.0), torch.ones(3)
    assert call(none) == [torch.float64] and call(some) == [torch.float32]
    assert call(some, none) == [torch.float32, torch.float64]


def test_a_leaf_that_requires_grad_is_refused_as_by_torch() -> None:
    p, g, m = lists()
    run(p, g, m)
    p[2].requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        run(p, g, m)
    with torch.no_grad():
        run(p, g, m)


def test_programs_are_forgotten_with_the_plans_that_prepared_them() -> None:
    prepared = maps.Prepared(_twice(), (LIST,), (maps.NEW,))
    number, xs = prepared.number, [torch.ones(3)]
    made, served = torch.ops.torchhal_cpu_x86.foreach(xs, [], number)
    assert served and torch.equal(made[0], xs[0] * 2)
    del prepared
    with pytest.raises(RuntimeError, match="none that was prepared"):
        torch.ops.torchhal_cpu_x86.foreach(xs, [], number)


def _twice() -> Any:
    from torchhal.pointwise import capture

    return capture(lambda x: x * 2.0, [("x", torch.float32)], what="function").graph


def test_the_operator_refuses_lists_that_the_program_does_not_take() -> None:
    prepared = maps.Prepared(_twice(), (LIST,), (maps.GIVEN,))
    with pytest.raises(RuntimeError, match="3 tensors and 0 numbers"):
        torch.ops.torchhal_cpu_x86.foreach([torch.ones(2)] * 3, [], prepared.number)


# ---------------------------------------------------------------------------- reductions


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_have_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    xs = [torch.randn(n).to(dtype) for n in (100_000, 3, 70_001)]
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(torchhal.foreach_reduce(lambda x: x * x * x, xs, backend="cpu_x86"))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sums_have_the_same_bits_with_gradients_asked_for(dtype: torch.dtype) -> None:
    def call(xs: list[Tensor], ys: list[Tensor]) -> Any:
        return torchhal.foreach_reduce(lambda x, y: (x * x * y, (x > 0).long()), xs, ys, backend="cpu_x86")

    sizes = ((700, 100), (0,), (3,), (70_001,))
    xs, ys = ([torch.randn(size).to(dtype).requires_grad_() for size in sizes] for _ in range(2))
    with torch.no_grad():
        plain = call(xs, ys)
    found = call(xs, ys)
    for mine, other in zip(found, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert found[0][0].requires_grad and not found[1][0].requires_grad
    grads = torch.autograd.grad(sum(found[0]), [*xs, *ys])
    wanted = torch.autograd.grad(sum((x * x * y).sum() for x, y in zip(xs, ys, strict=True)), [*xs, *ys])
    assert all(torch.allclose(a, b, rtol=0.02, atol=1e-6) for a, b in zip(grads, wanted, strict=True))


def test_sums_have_second_derivatives() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return torchhal.foreach_reduce(lambda a, b, c: torch.tanh(a * b) * c, [x], [y], s, backend="cpu_x86")[
            0
        ]

    assert torch.autograd.gradcheck(call, (x, y, s)) and torch.autograd.gradgradcheck(call, (x, y, s))


def test_second_derivatives_come_from_the_same_code() -> None:
    x, y = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    s = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return torchhal.foreach_map(lambda a, b, c: torch.tanh(a * b) * c, [x], [y], s, backend="cpu_x86")[0]

    assert torch.autograd.gradcheck(call, (x, y, s)) and torch.autograd.gradgradcheck(call, (x, y, s))


def test_only_what_the_derivative_reads_is_kept_so_the_rest_may_be_overwritten() -> None:
    x = torch.randn(3, requires_grad=True)
    z = [x * 1.0]
    torchhal.foreach_map(lambda a, b: a + b * b, z, [x], out=z, backend="cpu_x86")
    z[0].sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, 1 + 2 * x.detach())


def test_an_operand_that_results_do_not_depend_on_has_no_gradient() -> None:
    x, y = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    (out,) = torchhal.foreach_map(lambda a, b: a * 2 + (b > 0), [x], [y], backend="cpu_x86")
    grads = torch.autograd.grad(out.sum(), (x, y), allow_unused=True)
    assert torch.equal(grads[0], torch.full((3,), 2.0)) and grads[1] is None


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_torchs_foreach_optimizers_are_served_under_the_mode(make: Any) -> None:
    found = []
    for served in (True, False):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(20)) for _ in range(3)]
        rule = make(params, lr=0.01, foreach=True)
        before = sum(route.count for route in torchhal.routes() if route.chosen == "cpu_x86")
        for _ in range(3):
            for p in params:
                p.grad = torch.sin(p.detach())
            with (
                torchhal.use("cpu_x86" if served else "reference"),
                torchhal.enable() if served else nullcontext(),
            ):
                rule.step()
        after = sum(route.count for route in torchhal.routes() if route.chosen == "cpu_x86")
        assert (after > before) is (served and make is not torch.optim.SGD)
        found.append(params)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(*found, strict=True))
