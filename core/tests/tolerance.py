"""The accuracy rule of the project: an error is judged by that of a plain evaluation in the same type."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


def assert_accurate(
    result: torch.Tensor,
    oracle64: Array | torch.Tensor,
    baseline_same_dtype: torch.Tensor,
    k: float = 2,
    what: str = "result",
) -> None:
    """Assert that ``result`` is as good as a plain evaluation in its own type.

    Both its largest and its root-mean-square error against ``oracle64`` (a float64 computation from the
    already rounded inputs) must be at most ``k`` times those of ``baseline_same_dtype``, plus 2 ulp at the
    largest value, or 1 ulp at the root mean square. Where the oracle is not finite the result must be it.

    Args:
        k: 2 for forward results, 3 for gradients.
    """
    expected = torch.as_tensor(oracle64, dtype=torch.float64)
    assert result.shape == expected.shape == baseline_same_dtype.shape, (
        f"{what}: {result.shape} {expected.shape}"
    )
    got, plain = (tensor.detach().to(torch.float64).cpu() for tensor in (result, baseline_same_dtype))
    finite = torch.isfinite(expected)
    same = torch.equal(torch.nan_to_num(got[~finite], nan=0.5), torch.nan_to_num(expected[~finite], nan=0.5))
    assert same, f"{what}: expected {expected[~finite]} where the oracle is not finite and got {got[~finite]}"
    if not finite.any():
        return
    error, allowed = got[finite] - expected[finite], plain[finite] - expected[finite]
    for name, norm, ulps in (("largest", _largest, 2), ("root-mean-square", _rms, 1)):
        bound = k * norm(allowed) + ulps * ulp(norm(expected[finite]), result.dtype)
        measured = norm(error)
        assert measured <= bound, f"{what}: {name} error {measured:.3g} exceeds {bound:.3g}"


def ulp(value: float, dtype: torch.dtype) -> float:
    """Distance between neighbouring numbers of a floating type at ``value``."""
    info = torch.finfo(dtype)
    return float(2.0 ** math.floor(math.log2(max(value, info.tiny))) * info.eps)


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max())


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())
