"""Is the result as near to the truth as plain arithmetic in the same type?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from torchhal.hookspecs import FAMILIES
from torchhal_conformance import calls, tolerance
from torchhal_conformance.families import samples
from torchhal_conformance.model import Check, CheckFailed, Explanation, Measured, Outputs, Sample

FEW: Final = 64
"""Elements below which errors of several draws are pooled: one draw of a few says more of luck than of arithmetic."""
DRAWS: Final = 16

EXPLANATION: Final = Explanation(
    tests=(
        "Computes the call and holds it against a float64 evaluation of the same, already rounded inputs. Largest and "
        "root-mean-square error may be twice those of plain torch in the same type, plus 2 and 1 ulp."
    ),
    why=(
        "Fixed tolerances hide faults: torch's default for bfloat16 lets a dropped key through, and a test that "
        "scaled its tolerance with the length of a sum passed a kernel that returned zeros (FlagGems, test_sum). "
        "PyTorch's paged FlexAttention was wrong for key lengths that are no multiple of a page (#160861, #159247)."
    ),
    debug=(
        "The place named is the worst element. Look whether errors sit in the last tile, in one head, or everywhere; in "
        "float64 a right algorithm agrees to 1e-15. A ratio just above 1 everywhere is accumulation in the element type."
    ),
)

FAMILIES_WITH_NUMBERS: Final = ("attention", "matmul", "foreach")


def run(backend: str, sample: Sample, seed: int) -> Measured:
    """Judge one call, or several small ones together."""
    found, exact, plain = _draw(backend, sample, seed)
    names = [f"result {i}" for i in range(len(exact))]
    if not exact or sum(t.numel() for t in exact) >= FEW * len(exact) or not any(t.numel() for t in exact):
        return Measured(tolerance.judge(found, exact, plain, tolerance.FORWARD, names))
    draws = [(found, exact, plain), *(_draw(backend, sample, seed + i) for i in range(1, DRAWS))]
    pooled = [
        tuple(torch.cat([t.flatten() for t in each]) for each in zip(*column)) for column in zip(*draws)
    ]
    return Measured(tolerance.judge(pooled[0], pooled[1], pooled[2], tolerance.FORWARD, names))


def _draw(backend: str, sample: Sample, seed: int) -> tuple[Outputs, Outputs, Outputs]:
    inputs = calls.make(sample, backend, seed)
    found = calls.call(sample, backend, inputs)
    exact, plain = calls.truth(sample, inputs)
    tolerance.check_shapes(found, exact, [f"result {i}" for i in range(len(exact))])
    for number, (result, like) in enumerate(zip(found, plain)):
        if result.dtype is not like.dtype:
            raise CheckFailed(f"result {number} of type {like.dtype}", result.dtype)
    return found, exact, plain


def checks() -> Iterator[Check]:
    """One check for each family whose results are tensors."""
    for family in FAMILIES_WITH_NUMBERS:
        assert family in FAMILIES
        yield Check(
            name=f"{family}.numbers",
            explanation=EXPLANATION,
            # Of integers the bits are the truth, which another check compares.
            samples=lambda family=family: (s for s in samples(family) if "integer" not in s.tags),  # type: ignore[misc]
            run=run,
            refuses=True,
        )
