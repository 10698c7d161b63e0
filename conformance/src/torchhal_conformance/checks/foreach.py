"""Does foreach arithmetic give torch's bits, element types included?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from torchhal_conformance import calls, tolerance
from torchhal_conformance.families import samples
from torchhal_conformance.model import Check, CheckFailed, Explanation, Measured, Sample

EXPLANATION: Final = Explanation(
    tests=(
        "Maps functions of IEEE arithmetic, comparison and selection over lists and holds every result against the same "
        "function of torch, tensor by tensor: element type, shape and every bit, signs of zeros included. A NaN need only "
        "be a NaN."
    ),
    why=(
        "A fused loop that contracts x * y + z into one rounding, or keeps bfloat16 in float32 between two operations, is "
        "more exact and still another optimiser: training can not be resumed elsewhere. torch's own foreach functions "
        "differed from its single-tensor ones in how Python numbers promote."
    ),
    debug=(
        "A difference in the last bit of float32 alone is a contraction (-ffp-contract, fma). In 16-bit types it is a "
        "missing rounding between operations. A wrong element type points at promotion of numbers or 0-dim tensors."
    ),
)


def run(backend: str, sample: Sample, seed: int) -> Measured:
    """One call against torch's loop."""
    inputs = calls.make(sample, backend, seed)
    _, plain = calls.truth(sample, inputs)
    found = calls.call(sample, backend, inputs)
    names = [f"result {number}" for number in range(len(plain))]
    tolerance.check_shapes(found, plain, names)
    for name, got, wanted in zip(names, found, plain):
        _require_bits(name, got, wanted)
    return Measured()


def _require_bits(name: str, got: Tensor, wanted: Tensor) -> None:
    if got.dtype is not wanted.dtype:
        raise CheckFailed(f"{name} of {wanted.dtype}", got.dtype)
    one, other = (t.detach().cpu().nan_to_num(7.0, torch.inf, -torch.inf) for t in (got, wanted))
    if calls.same_bits(one, other) and torch.equal(got.isnan(), wanted.isnan()):
        return
    at = tuple((one != other).nonzero()[:1].flatten().tolist())
    if not at and one.dim():  # no value differs, so a sign of zero or a NaN does
        at = (0,) * one.dim()
    raise CheckFailed(
        f"{name} to have the bits that torch gives tensor by tensor",
        f"{got[at].item()!r} instead of {wanted[at].item()!r} at {at}",
    )


def checks() -> Iterator[Check]:
    """One."""
    yield Check(
        name="foreach.bitwise",
        explanation=EXPLANATION,
        samples=lambda: (s for s in samples("foreach") if "bitwise" in s.tags),
        run=run,
        refuses=False,
    )
