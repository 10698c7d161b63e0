"""Do gradients in float64 agree with finite differences of the call itself?"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from torchhal_conformance import calls
from torchhal_conformance.families import samples
from torchhal_conformance.model import Check, CheckFailed, Explanation, Measured, Outputs, Sample

ATOL: Final = 1e-8
RTOL: Final = 1e-4
"""Central differences with steps of 1e-6 have errors of about 1e-10 here; torch's own defaults let 1 % pass."""


def run(backend: str, sample: Sample, seed: int) -> Measured:
    """``torch.autograd.gradcheck`` of the call, with respect to every float64 leaf, along random directions."""
    inputs = calls.make(sample, backend, seed)
    names = [name for name in sample.leaves if inputs[name].dtype is torch.float64]
    leaves = [inputs[name].detach().clone().requires_grad_() for name in names]

    def function(*given: Tensor) -> Outputs:
        outputs = calls.call(sample, backend, {**inputs, **dict(zip(names, given))})
        # A row that sees no key has an LSE of -inf, of which no difference can be taken.
        return tuple(torch.where(torch.isfinite(t.detach()), t, 0.0) for t in outputs if t.requires_grad)

    if not function(*leaves):
        raise CheckFailed(f"results that gradients reach from {', '.join(names)}", "none")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed % 2**31)
        try:
            torch.autograd.gradcheck(
                function, leaves, atol=ATOL, rtol=RTOL, fast_mode=True, check_undefined_grad=False
            )
        except GradcheckError as error:
            raise CheckFailed("gradients that agree with finite differences", _first_lines(error)) from error
    return Measured()


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _asked(family: str) -> Iterator[Sample]:
    """Small calls in float64 alone: differences of 1e-6 drown in the rounding of anything narrower.

    Small, because torch explains a failure by differences in every element, one after the other.
    """
    for sample in samples(family):
        every = set(sample.needs.dtypes) == {torch.float64}
        if sample.leaves and every and "small" in sample.tags and "integer" not in sample.tags:
            yield sample


EXPLANATION: Final = Explanation(
    "Runs torch.autograd.gradcheck on the float64 call (fast mode: random directions) with respect to everything that gradients "
    "reach; the same formula gives forward and backward, so no other evaluation takes part.",
    "Where forward and backward are two kernels, a change of one (a clamp, a scale, another dropout mask) that the other does "
    "not follow leaves each plausible alone; training then descends along the gradient of another function.",
    "gradcheck names the input: compare that gradient with (f(x + h) - f(x - h)) / 2h in the element with the largest difference.",
)


def checks() -> Iterator[Check]:
    """One for each family that computes gradients."""
    for family in ("attention", "matmul", "foreach"):
        yield Check(
            name=f"{family}.gradcheck",
            explanation=EXPLANATION,
            samples=lambda family=family: _asked(family),  # type: ignore[misc]
            run=run,
            profile="training",
        )
