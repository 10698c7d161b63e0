"""The portable Triton kernels of foreach against torch's bits and the reference, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import interpreted
import numpy as np
import pytest
import torch
from fake_backends import Install
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchhal
from torchhal import BackendInfo, Capabilities, Plan, hookimpl
from torchhal.portable import foreach
from torchhal.portable.foreach import Blocks, Mapper
from torchhal.portable.foreach_direct import direct
from torchhal.problems import ForeachProblem

DEVICE = torch.device(interpreted.DEVICE, 0) if interpreted.DEVICE != "cpu" else torch.device("cpu")
SMALL = Blocks(elements=16, warps=1, reduced=32, settled=4)
"""Blocks of which the tensors here have several, and a part of one."""
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
few = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
launches: list[Any] = []


@pytest.fixture(autouse=True)
def portable(install: Install) -> None:
    """A backend that is nothing but the kernels."""
    launches.clear()
    install("portable", plugin())


def plugin() -> SimpleNamespace:
    def start(*arguments: Any) -> Any:
        def counted(*others: Any) -> None:
            launches.append(arguments[0])
            with np.errstate(all="ignore"):
                again(*others)

        launches.append(arguments[0])
        with np.errstate(all="ignore"):
            again = foreach.start(*arguments)

        return counted

    @hookimpl
    def torchhal_backend() -> BackendInfo:
        return BackendInfo(
            name="portable", vendor="tests", device_types=frozenset({DEVICE.type}), spec=">=1.0,<2",
            capabilities=Capabilities(foreach=foreach.CLAIMS), preference={DEVICE.type: 1000},
        )  # fmt: skip

    @hookimpl
    def torchhal_foreach(problem: ForeachProblem) -> Plan:
        mapper = Mapper(problem.device, SMALL, start)
        return Plan(foreach.mapping(problem, mapper), differentiable=True, direct=direct(problem, mapper))

    return SimpleNamespace(torchhal_backend=torchhal_backend, torchhal_foreach=torchhal_foreach)


def mapped(function: Callable[..., Any], *operands: Any, **options: Any) -> Any:
    return torchhal.foreach_map(function, *operands, backend="portable", **options)


def drawn(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return (torch.rand(tuple(shape), generator=generator) > 0.5).to(DEVICE)
    if not dtype.is_floating_point:
        return torch.randint(1, 12, tuple(shape), generator=generator).to(dtype).to(DEVICE)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Types, shapes and bits."""
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert torch.equal(got, want), (got, want)


def chain(x: Any, y: Any) -> Any:
    return ((x - y) * x + y) * 0.7 - x / 3


# ---------------------------------------------------------------------------- any lists

LAID: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
    "gaps": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t,
    "expanded": lambda t: t[..., :1].expand(t.shape) if t.dim() else t,
}
SHAPES = (
    ((3,), (3,)), ((2, 5), (2, 5)), ((40,), (40,)), ((), ()), ((0, 2), (0, 2)), ((4, 1), (3,)), ((2, 1, 3), (4, 1)), ((5,), ()),
)  # fmt: skip
shapes = st.sampled_from(SHAPES)
kind = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32])


@few
@given(
    rows=st.lists(st.tuples(shapes, kind, kind, st.sampled_from(list(LAID)), st.sampled_from(list(LAID))), min_size=1, max_size=4),
    number=st.sampled_from([0.3, 2, -1.5]),
)  # fmt: skip
def test_any_lists_give_torchs_bits(rows: list[Any], number: float) -> None:
    xs = [LAID[lie](drawn(shape[0], dtype, i)) for i, (shape, dtype, _, lie, _) in enumerate(rows)]
    ys = [LAID[lie](drawn(shape[1], dtype, 9 + i)) for i, (shape, _, dtype, _, lie) in enumerate(rows)]

    def function(x: Any, y: Any, n: Any) -> Any:
        return x * n + y, (x - y) * x

    found = mapped(function, xs, ys, number)
    wanted = [function(x, y, number) for x, y in zip(xs, ys, strict=True)]
    for output in range(2):
        same(found[output], [w[output] for w in wanted])


def test_lists_of_numbers_and_scalars_and_captured_tensors_go_along() -> None:
    held, scalar = (torch.tensor(value, device=DEVICE) for value in (0.7, 1.5))
    xs = [drawn(shape, torch.float32, 1) for shape in ((3,), (2, 40))]
    for numbers in ([0.5, 2.0], [3, 4], [True, 0.25]):
        found = mapped(lambda x, n, s: x * n + s * held, xs, numbers, scalar)
        same(found, [x * n + scalar * held for x, n in zip(xs, numbers, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quotients_by_a_number_are_rounded_correctly_where_they_are_not_normal(dtype: torch.dtype) -> None:
    xs = [(torch.arange(1, 40) * torch.finfo(dtype).smallest_normal / 16).to(dtype).to(DEVICE)]
    # torch's own kernels for accelerators multiply by a rounded inverse.
    same([t.cpu() for t in mapped(lambda x: x / 3, xs)], [xs[0].cpu() / 3])


def test_each_position_of_a_long_list_is_written_by_one_launch() -> None:
    xs = [drawn((1 + i % 33,), torch.float32, i) for i in range(70)]
    found = mapped(torch.neg, xs)
    same(found, [-x for x in xs])
    assert len(launches) == 1


def test_types_that_vary_along_a_list_take_a_launch_each() -> None:
    xs = [drawn((5,), (torch.float32, torch.bfloat16)[i % 2], i) for i in range(10)]
    same(mapped(lambda x: x * 0.3, xs), [x * 0.3 for x in xs])
    assert len(launches) == 2


# ---------------------------------------------------------------------------- in place


def step(p: Any, g: Any, m: Any, rate: Any) -> Any:
    m = m * 0.5 + g
    return p - rate * m, m


def lists(sizes: Sequence[int] = (3, 40, 16, 0)) -> list[list[Tensor]]:
    return [[drawn((size,), torch.float32, 7 * i + size) for size in sizes] for i in range(3)]


def check_step(p: list[Tensor], g: list[Tensor], m: list[Tensor], rate: Any) -> None:
    wanted = [step(*values, rate) for values in zip(p, g, m, strict=True)]
    mapped(step, p, g, m, rate, out=(p, m))
    same(p, [w[0] for w in wanted])
    same(m, [w[1] for w in wanted])


def test_steps_on_the_same_tensors_upload_nothing_and_follow_their_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p, g, m = lists()
    check_step(p, g, m, 0.1)
    check_step(p, g, m, 0.2)
    uploads: list[Any] = []
    monkeypatch.setattr(foreach, "upload", lambda *a: uploads.append(a))
    for rate in (0.3, 0.4, torch.tensor(0.5, device=DEVICE).item()):
        check_step(p, g, m, rate)
    assert not uploads and len(launches) == 5


def test_tensors_that_come_back_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    p, g, m = lists()
    others = lists()[1]
    for grads in (g, others):
        check_step(p, grads, m, 0.1)
    check_step(p, g, m, 0.1)
    monkeypatch.setattr(foreach, "upload", lambda *a: pytest.fail("uploaded again"))
    for grads in (g, others, g):
        check_step(p, grads, m, 0.1)


@pytest.mark.parametrize("quick", [True, False], ids=["guards", "no guards"])
def test_what_changed_since_the_last_step_is_seen(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not quick:
        monkeypatch.setattr("torchhal.portable.foreach_direct._blocks", lambda lists: None)
    p, g, m = lists()
    for _ in range(3):
        check_step(p, g, m, 0.1)
    g[1] = drawn((40,), torch.float32, 99)  # another tensor
    check_step(p, g, m, 0.1)
    m[0].data = drawn((3,), torch.float32, 98)  # other memory
    check_step(p, g, m, 0.1)
    for items in (p, g, m):
        items[2].data = items[2].data.view(4, 4).t()  # other strides of the same memory
    check_step(p, g, m, 0.1)
    for items in (p, g, m):
        items[1].data = items[1].data[:7]  # fewer elements at the same address
    check_step(p, g, m, 0.1)
    g[1].data = g[1].data.view(1, 7)
    with pytest.raises(torchhal.errors.InvalidProblem, match="shape"):
        mapped(step, p, g, m, 0.1, out=(p, m))


def test_destinations_that_overlap_are_refused_at_every_step() -> None:
    buffer = torch.zeros(8, device=DEVICE)
    xs = [torch.ones(4, device=DEVICE) for _ in range(2)]
    mapped(lambda x: x * 2, xs, out=[buffer[:4], buffer[4:]])
    for _ in range(2):
        with pytest.raises(torchhal.errors.InvalidProblem, match="share memory"):
            mapped(lambda x: x * 2, xs, out=[buffer[:4], buffer[3:7]])


def test_writing_in_place_is_seen_by_autograd() -> None:
    p, g, m = lists()
    for _ in range(2):
        before = [t._version for t in (*p, *m, *g)]
        check_step(p, g, m, 0.1)
        changed = [t._version > old for t, old in zip((*p, *m, *g), before, strict=True)]
        assert changed == [True] * 8 + [False] * 4


def test_misaligned_tensors_are_computed_with_as_they_lie() -> None:
    p, g, m = ([torch.cat([t[:1], t])[1:] if i % 2 else t for i, t in enumerate(items)] for items in lists())
    check_step(p, g, m, 0.1)
    check_step(p, g, m, 0.2)


# ---------------------------------------------------------------------------- gradients


def test_gradients_are_those_of_torch_and_take_one_pass_more() -> None:
    xs, ys = ([drawn(s, torch.float64, i + n) for n, s in enumerate(((3,), (2, 20)))] for i in (0, 5))
    held = torch.tensor(0.3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    leaves = [t.requires_grad_() for t in (*xs, *ys)] + [held]

    def function(x: Any, y: Any) -> Any:
        return torch.tanh(x * held) * y

    found = mapped(function, xs, ys)
    got = torch.autograd.grad([t.square().sum() for t in found], leaves)
    wanted = torch.autograd.grad([function(x, y).square().sum() for x, y in zip(xs, ys, strict=True)], leaves)
    assert len(launches) == 2
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------- reductions


@few
@given(
    shapes=st.lists(st.sampled_from([(), (0,), (3,), (2, 40), (16,), (300,)]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool]),
    lie=st.sampled_from(list(LAID)),
    reduction=st.sampled_from(["sum", "max", "any"]),
    odd=st.booleans(),
)  # fmt: skip
def test_reductions_are_what_the_specification_says(
    shapes: list[Any], dtype: torch.dtype, lie: str, reduction: str, odd: bool
) -> None:
    xs = [LAID[lie](drawn(shape, dtype, i)) for i, shape in enumerate(shapes)]
    if odd and dtype.is_floating_point:
        xs = [torch.where(x > 1, float("nan"), -x).to(dtype) for x in xs]
    found, wanted = (
        torchhal.foreach_reduce(lambda x: x, xs, reduction=reduction, backend=name)
        for name in ("portable", "reference")
    )
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype is want.dtype and got.shape == ()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_norm_takes_two_launches_and_keeps_its_bits() -> None:
    xs = [drawn((1 + i % 50,), torch.float32, i) for i in range(20)]
    first = torchhal.foreach_norm(xs, backend="portable")
    assert len(launches) == 2
    same(torchhal.foreach_norm(xs, backend="portable"), first)
    exact = [x.double().square().sum().sqrt().float() for x in xs]
    torch.testing.assert_close(first, exact, rtol=1e-6, atol=0)


def test_one_nan_in_a_long_list_is_found() -> None:
    xs = [drawn((30,), torch.float32, i) for i in range(9)]
    assert not torchhal.foreach_any_nonfinite(xs, backend="portable")
    xs[7][29] = float("nan")
    assert torchhal.foreach_any_nonfinite(xs, backend="portable")
