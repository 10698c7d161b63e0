"""What a backend with gradients of its own needs around them, whatever the family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchhal.errors import Unsupported


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work, whose tensors plain torch alone takes."""
    return forward_ad._current_level >= 0 or bool(torch._C._are_functorch_transforms_active())


def first_derivatives(
    who: str, family: str, results: Sequence[Tensor], sources: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients that depend on the tensors behind them, and refuse to be differentiated by them.

    Args:
        who: what computed the gradients, for the message: a backend's name.
        family: what they are gradients of: ``attention``.
        results: the gradients.
        sources: every tensor that they were computed from.
    """
    return cast(
        tuple[Tensor, ...],
        _FirstDerivatives.apply(who, family, len(results), *results, *sources),  # type: ignore[no-untyped-call]
    )


class _FirstDerivatives(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, who: str, family: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.who, ctx.family = who, family
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise Unsupported(
            f"{ctx.who} computes the first derivatives of {ctx.family} and no second ones, which were asked for; call "
            f"{ctx.family} with backend='reference', whose derivatives are plain torch's"
        )
