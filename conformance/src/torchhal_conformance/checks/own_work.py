"""Does a backend do the work it was chosen for, or does it hand it on to another one?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torchhal
from torchhal_conformance import calls
from torchhal_conformance.checks.promises import representatives
from torchhal_conformance.model import Check, CheckFailed, Explanation, Measured, Sample

EXPLANATION: Final = Explanation(
    "Makes a call and compares torchhal's own account of routes before and after: the backend that was named served it, and it "
    "asked torchhal for nothing of the same family that another backend then served.",
    "Who falls back without a word passes every test of numbers and none of speed. torch's scaled_dot_product_attention chooses "
    "its kernel so: whether a call keeps the fused one is told by torch.backends.cuda.can_use_flash_attention(debug=True) alone.",
    "Print torchhal.routes() after the call. A problem that a plan can not serve is declined when it is asked, with a reason.",
)


def run(backend: str, sample: Sample, seed: int) -> Measured:
    """One call, and who did it."""
    inputs = calls.make(sample, backend, seed)
    family = sample.needs.family
    before = _others(family, backend)
    calls.call(sample, backend, inputs)
    for chosen, count in _others(family, backend).items():
        if count > before.get(chosen, 0):
            raise CheckFailed(
                f"the call served by {backend!r} alone", f"{count - before.get(chosen, 0)} by {chosen!r}"
            )
    return Measured()


def _others(family: str, backend: str) -> dict[str, int]:
    """How many calls of a family other backends have served so far."""
    counts: dict[str, int] = {}
    for route in torchhal.routes():
        if route.problem.family == family and route.chosen not in (None, backend):
            counts[str(route.chosen)] = counts.get(str(route.chosen), 0) + route.count
    return counts


def checks() -> Iterator[Check]:
    """One for each family whose results are tensors."""
    for family in ("attention", "matmul", "foreach"):
        yield Check(
            name=f"{family}.own_work",
            explanation=EXPLANATION,
            samples=lambda family=family: representatives(family),  # type: ignore[misc]
            run=run,
        )
