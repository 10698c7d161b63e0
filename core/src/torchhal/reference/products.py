"""The two products of attention, in a form where a pair that does not take part can not leave a trace.

In floating point ``0 * nan`` is ``nan``, so multiplying by a weight of zero does not hide a value. These
products count a pair (row i of one operand, row j of the other) only where told to, forward and backward.
Each one's derivative is the other one, so both can be differentiated any number of times.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import is_fake


def pair_products(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.mT``: (..., I, E), (..., J, E) -> (..., I, J).

    A pair whose cotangent is exactly zero passes no gradient to either row, whatever the rows hold.
    """
    return cast(Tensor, _PairProducts.apply(left, right))  # type: ignore[no-untyped-call]


def weighted_sum(weights: Tensor, counts: Tensor | None, values: Tensor) -> Tensor:
    """``weights @ values``: (..., I, J), (..., J, E) -> (..., I, E), over the pairs that count.

    Args:
        weights: finite or not; exactly zero for every pair that does not count.
        counts: boolean, the shape of ``weights``; None if every pair counts.
        values: a NaN or an infinity reaches exactly those rows i for which pair (i, j) counts.
    """
    return cast(Tensor, _WeightedSum.apply(weights, counts, values))  # type: ignore[no-untyped-call]


class _PairProducts(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        return _product(left, right.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        left, right = ctx.saved_tensors
        return pair_products(tangents[0], right) + pair_products(left, tangents[1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        (cotangent,) = cotangents
        counts = cotangent != 0
        for_left = weighted_sum(cotangent, counts, right) if ctx.needs_input_grad[0] else None
        for_right = weighted_sum(cotangent.mT, counts.mT, left) if ctx.needs_input_grad[1] else None
        return for_left, for_right


class _WeightedSum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, counts: Tensor | None, values: Tensor) -> Tensor:
        if counts is None or _known_finite(values):
            return _product(weights, values)
        finite = _product(weights, torch.where(torch.isfinite(values), values, 0.0))
        return finite + _infinities(counts.to(values.dtype), values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        weights, counts, values = ctx.saved_tensors
        for_weights, _, for_values = tangents
        if counts is not None:
            for_weights = torch.where(counts, for_weights, 0.0)
        return weighted_sum(for_weights, counts, values) + weighted_sum(weights, counts, for_values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        weights, counts, values = ctx.saved_tensors
        (cotangent,) = cotangents
        for_weights = for_values = None
        if ctx.needs_input_grad[0]:
            for_weights = pair_products(cotangent, values)
            for_weights = for_weights if counts is None else torch.where(counts, for_weights, 0.0)
        if ctx.needs_input_grad[2]:
            for_values = weighted_sum(weights.mT, None if counts is None else counts.mT, cotangent)
        return for_weights, None, for_values


def _product(left: Tensor, right: Tensor) -> Tensor:
    # Autocast would round both operands to 16 bits; attention's own inputs are the only thing it may round.
    device = left.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return left @ right
    with torch.autocast(device, enabled=False):
        return left @ right


def _known_finite(values: Tensor) -> bool:
    # On the CPU a look costs little and saves two products; elsewhere the host would wait for the device.
    if values.device.type != "cpu" or is_fake(values) or is_functorch_wrapped_tensor(values):
        return False
    return bool(torch.isfinite(values).all())


def _infinities(counts: Tensor, values: Tensor) -> Tensor:
    """What the non-finite values of the counted pairs add up to: 0, inf, -inf or nan; (..., I, E)."""
    undefined = torch.isnan(values)
    positive = _product(counts, (undefined | (values == torch.inf)).to(counts.dtype)) > 0
    negative = _product(counts, (undefined | (values == -torch.inf)).to(counts.dtype)) > 0
    zero = torch.zeros((), dtype=counts.dtype, device=counts.device)
    return torch.where(positive, torch.inf, zero) + torch.where(negative, -torch.inf, zero)
