"""Do gradients reach everything they are claimed to reach, as near to the truth as plain arithmetic?"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from torchhal_conformance import calls, tolerance
from torchhal_conformance.checks.numbers import DRAWS, FEW
from torchhal_conformance.families import samples
from torchhal_conformance.model import Check, CheckFailed, Explanation, Inputs, Measured, Outputs, Sample

EXPLANATION: Final = Explanation(
    tests=(
        "Takes gradients of a random linear function of all outputs, the LSE among them, and holds them against autograd "
        "through the float64 evaluation: three times plain arithmetic's error, plus 2 and 1 ulp."
    ),
    why=(
        "A backward that ignores the gradient of the LSE trains a wrong model in every ring-attention job and passes "
        "all tests of the output alone; FlexAttention's learned biases had faults in several releases (PyTorch #145208, #157677, #166722)."
    ),
    debug=(
        "Which leaf differs says where: the query's gradient alone points at the row sum (delta), key and value at a missing "
        "tile, a captured tensor at its scatter. Set the LSE's cotangent to zero to tell its part apart."
    ),
)


def run(backend: str, sample: Sample, seed: int) -> Measured:
    """Gradients of one call, or of several together where a leaf has few elements."""
    draws = [_draw(backend, sample, seed)]
    if any(t.numel() < FEW for t in draws[0][1]):
        draws += [_draw(backend, sample, seed + number) for number in range(1, DRAWS // 2)]
    pooled = [[torch.cat([t.flatten() for t in leaf]) for leaf in zip(*kind)] for kind in zip(*draws)]
    return Measured(tolerance.judge(pooled[0], pooled[1], pooled[2], tolerance.BACKWARD, sample.leaves))


def _draw(backend: str, sample: Sample, seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The backend's gradients, the true ones and the plain ones."""
    inputs = calls.make(sample, backend, seed)
    with calls.harness():
        exact, plain, cotangents = _truths(sample, inputs, seed)
    found = _gradients(sample, inputs, lambda given: calls.call(sample, backend, given), cotangents)
    given = []
    for leaf, gradient, truth in zip(sample.leaves, found, exact):
        if gradient is None or gradient.shape != truth.shape:
            wanted = f"a gradient of shape {tuple(truth.shape)} for {leaf}"
            raise CheckFailed(wanted, "none" if gradient is None else tuple(gradient.shape))
        given.append(gradient)
    return given, exact, plain


def _truths(sample: Sample, inputs: Inputs, seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    with torch.no_grad():
        outputs = sample.exact(inputs)
    generator = torch.Generator().manual_seed(seed + 1)
    cotangents = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device) for t in outputs
    ]
    wide = {name: value.double() if name in sample.leaves else value for name, value in inputs.items()}
    exact = _gradients(sample, wide, sample.exact, cotangents)
    plain = _gradients(sample, inputs, sample.plain, cotangents)
    return (
        [torch.zeros(()) if g is None else g for g in exact],
        [torch.zeros(()) if g is None else g for g in plain],
        cotangents,
    )


def _gradients(
    sample: Sample, inputs: Inputs, function: object, cotangents: list[Tensor]
) -> list[Tensor | None]:
    given = dict(inputs)
    leaves = []
    for name in sample.leaves:
        given[name] = inputs[name].detach().clone().requires_grad_()
        leaves.append(given[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs: Outputs = function(given)  # type: ignore[operator]
        pairs = [(o, c) for o, c in zip(outputs, cotangents) if o.requires_grad]
        if not pairs:
            return [None] * len(leaves)
        # Rows that see no key have an LSE of -inf, whose cotangent means nothing.
        usable = [torch.where(torch.isfinite(o.detach()), c.to(o.dtype), 0.0) for o, c in pairs]
        return list(
            torch.autograd.grad(
                [o for o, _ in pairs],
                leaves,
                [c.to(o.dtype) for (o, _), c in zip(pairs, usable)],
                allow_unused=True,
            )
        )


def checks() -> Iterator[Check]:
    """One for each family that has samples with leaves."""
    for family in ("attention", "matmul", "foreach"):
        yield Check(
            name=f"{family}.gradients",
            explanation=EXPLANATION,
            samples=lambda family=family: (s for s in samples(family) if s.leaves),  # type: ignore[misc]
            run=run,
            profile="training",
        )
