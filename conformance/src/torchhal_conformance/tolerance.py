"""How far from the truth a result may be: as far as plain arithmetic in the same type ends up, times k, plus some ulp.

The oracle is float64 on the inputs as they were rounded, so the rounding of inputs is charged to nobody. Both the largest
error, which finds one bad tile, and the root mean square, which finds a loss spread over everything (accumulation in the
element type, for one), must be within their bounds. k is 2 forward and 3 backward, after FlashAttention's tests and
torch._dynamo.utils.same; vendors can not change it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from torchhal_conformance.model import CheckFailed

FORWARD: Final = 2.0
BACKWARD: Final = 3.0
LARGEST_ULPS: Final = 2.0
RMS_ULPS: Final = 1.0
OWN_ULPS: Final = 16.0
"""Of a float64 result, whose oracle is no more exact than it is: over 1031 keys two kernels were found 3 and 6 units from
an extended-precision evaluation, each in its own direction."""


def ratio(found: Tensor, exact: Tensor, plain: Tensor, k: float = FORWARD) -> float:
    """Error over bound, the worse of the two measures; infinite where the oracle is not finite and the result differs.

    Args:
        found: the result, any floating type.
        exact: float64, the truth.
        plain: an evaluation in the type that the result must have.
    """
    got, truth, baseline = (t.detach().to("cpu", torch.float64).flatten() for t in (found, exact, plain))
    finite = torch.isfinite(truth)
    if not torch.equal(_kinds(got[~finite]), _kinds(truth[~finite])) or not torch.isfinite(got[finite]).all():
        return math.inf
    if not finite.any():
        return 0.0
    truth, error, allowed = (
        truth[finite],
        (got - truth.where(finite, got))[finite],
        (baseline - truth)[finite],
    )
    allowed = allowed.nan_to_num(0.0, 0.0, 0.0)
    return max(
        _largest(error) / _bound(k * _largest(allowed), LARGEST_ULPS, _largest(truth), plain.dtype),
        _rms(error) / _bound(k * _rms(allowed), RMS_ULPS, _rms(truth), plain.dtype),
    )


def judge(
    found: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor], k: float, names: Sequence[str]
) -> float:
    """The worst ratio over several outputs.

    Raises:
        CheckFailed: one is beyond its bound, or has another shape or count.
    """
    check_shapes(found, exact, names)
    worst = 0.0
    for name, a, b, c in zip(names, found, exact, plain):
        value = ratio(a, b, c, k)
        if not value <= 1.0:
            raise CheckFailed(f"{name} within its bound", _describe(a, b, value), value)
        worst = max(worst, value)
    return worst


def check_shapes(found: Sequence[Tensor], exact: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise CheckFailed unless there are as many results as there should be, of the right shapes."""
    if len(found) != len(exact):
        raise CheckFailed(f"{len(exact)} results", len(found))
    for name, a, b in zip(names, found, exact):
        if a.shape != b.shape:
            raise CheckFailed(f"{name} of shape {tuple(b.shape)}", tuple(a.shape))


def ulp(value: float, dtype: torch.dtype) -> float:
    """Distance between neighbouring numbers of a floating type at ``value``."""
    info = torch.finfo(dtype)
    return float(2.0 ** math.floor(math.log2(max(value, info.tiny))) * info.eps)


def _describe(found: Tensor, exact: Tensor, value: float) -> str:
    difference = (found.detach().cpu().double() - exact.detach().cpu().double()).abs()
    at = int(difference.nan_to_num(math.inf).argmax()) if difference.numel() else 0
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), found.shape)) if found.dim() else ()
    return (
        f"{found.flatten()[at].item():.9g} instead of {exact.flatten()[at].item():.9g} at {place}, "
        f"{value:.3g} times the bound"
    )


def _kinds(values: Tensor) -> Tensor:
    """2 for NaN, 1 and -1 for the infinities, 0 for numbers."""
    return torch.where(values.isnan(), 2.0, torch.where(values.isinf(), values.sign(), 0.0))


def _bound(allowed: float, ulps: float, size: float, dtype: torch.dtype) -> float:
    return allowed + (OWN_ULPS if dtype is torch.float64 else ulps) * ulp(size, dtype)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
