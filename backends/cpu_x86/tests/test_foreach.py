"""What the native foreach does with tensors that are not simply their memory; numbers are the conformance suite's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from native_cases import Tensor

import torchhal


def twice(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    return torchhal.foreach_map(lambda x: x * 2, tensors, backend="cpu_x86", **options)  # type: ignore[no-any-return]


def test_vmap_and_jvp_go_through_plain_torch() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 2)
    a, b = torch.vmap(lambda a, b: tuple(twice([a, b])))(x, y)
    assert torch.equal(a, x * 2) and torch.equal(b, y * 2)
    with forward_ad.dual_level():
        (dual,) = twice([forward_ad.make_dual(x, torch.ones_like(x))])
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, torch.full_like(x, 2.0))


class Tagged(Tensor):
    """A subclass that does not compute differently."""


@pytest.mark.parametrize(
    "view", [torch._neg_view, lambda x: x.as_subclass(Tagged), lambda x: torch.nn.Parameter(x, False)]
)
def test_views_that_negate_and_subclasses_give_what_torch_gives(view: Callable[[Tensor], Tensor]) -> None:
    x = view(torch.randn(33))
    (found,) = twice([x])
    assert torch.equal(found, x * 2) and type(found) is type(x * 2)


def test_captured_tensors_destinations_and_gradients_may_be_views_that_negate() -> None:
    scalar = torch.tensor(1 + 2j).conj().imag
    (found,) = torchhal.foreach_map(lambda x: x * scalar, [torch.ones(3)], backend="cpu_x86")
    assert scalar.is_neg() and found.tolist() == [-2.0] * 3
    out = torch._neg_view(torch.zeros(3))
    twice([torch.ones(3)], out=[out])
    assert out.tolist() == [2.0] * 3
    x = torch.ones(3, requires_grad=True)
    twice([x])[0].backward(torch._neg_view(torch.ones(3)))
    assert x.grad is not None and x.grad.tolist() == [-2.0] * 3


@pytest.mark.parametrize("function", [torch.Tensor.exp_, torch.Tensor.sigmoid_])
def test_gradients_pass_through_functions_that_work_in_place(function: Callable[..., Any]) -> None:
    found = []
    for served in (True, False):
        leaf = torch.linspace(-1, 1, 5, requires_grad=True)
        m = leaf * 2
        if served:
            torchhal.foreach_map(function, [m], backend="cpu_x86")
        else:
            function(m)
        m.sum().backward()  # type: ignore[no-untyped-call]
        found.append(leaf.grad)
    assert torch.allclose(found[0], found[1], rtol=1e-6)


def test_destinations_in_other_strides_and_types_are_written_where_they_lie() -> None:
    xs = [torch.randn(5, 7), torch.randn(40)]
    wide = torch.full((7, 10), torch.nan, dtype=torch.float64)
    out = [wide[:, ::2].t(), torch.zeros(40)]
    twice(xs, out=out)
    assert torch.equal(out[0], (xs[0] * 2).double()) and torch.equal(out[1], xs[1] * 2)
    assert wide[:, 1::2].isnan().all()


def test_outputs_that_depend_on_operands_of_other_shapes_keep_their_own() -> None:
    xs, ys = [torch.randn(3, 4), torch.randn(2)], [torch.randn(4), torch.randn(2)]
    sums, doubled = torchhal.foreach_map(lambda x, y: (x + y, y * 2), xs, ys, backend="cpu_x86")
    for x, y, s, d in zip(xs, ys, sums, doubled, strict=True):
        assert torch.equal(s, x + y) and torch.equal(d, y * 2)
