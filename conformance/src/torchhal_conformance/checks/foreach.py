"""Does foreach arithmetic give torch's bits, element types included?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchhal_conformance import calls, tolerance
from torchhal_conformance.families import samples
from torchhal_conformance.model import Check, CheckFailed, Explanation, Inputs, Measured, Sample

EXPLANATION: Final = Explanation(
    tests=(
        "Maps functions of IEEE arithmetic, comparison and selection over lists and holds every result against the same "
        "function of torch, tensor by tensor: element type, shape and every bit, signs of zeros included. A NaN need only "
        "be a NaN. On an accelerator the bits may be those of torch there, or of torch on the CPU."
    ),
    why=(
        "A fused loop that contracts x * y + z into one rounding, or keeps bfloat16 in float32 between two operations, is "
        "more exact and still another optimiser: training can not be resumed elsewhere. torch's own foreach functions "
        "differed from its single-tensor ones in how Python numbers promote."
    ),
    debug=(
        "A difference in the last bit of float32 alone is a contraction (-ffp-contract, fma); square roots may be torch's or "
        "correctly rounded. In 16-bit types it is a "
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
    if not all(map(_same, found, plain)):
        with CorrectRoots():
            _, rounded = calls.truth(sample, _on_host(calls.make(sample, backend, seed)))
        for name, got, wanted, other in zip(names, found, plain, rounded):
            _require_bits(name, got, wanted, other)
    return Measured()


def _on_host(inputs: Inputs) -> Inputs:
    """The same data on the CPU, whose kernels a backend for an accelerator may follow too.

    Torch's kernels for accelerators multiply by the rounded inverse of a number that they should divide by, and keep numbers
    beside 16-bit values in float32; its ``_foreach_`` functions there divide.
    """
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}


class CorrectRoots(TorchFunctionMode):
    """Square roots rounded as IEEE 754 has it.

    Torch takes them from a vector library, whose last bit is another on some CPUs (11 of 40 random numbers with torch
    2.13 and MKL), so a backend is free to have either.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.sqrt, Tensor.sqrt) or kwargs or args[0].requires_grad:
            return func(*args, **(kwargs or {}))
        (x,) = args
        if not x.is_floating_point():
            return func(x)
        wide = x.detach().cpu().to(torch.promote_types(x.dtype, torch.float32))
        with np.errstate(invalid="ignore"):
            return torch.as_tensor(np.sqrt(wide.numpy())).to(x)


def _settled(tensor: Tensor) -> Tensor:
    """With one pattern of bits for every NaN."""
    return tensor.detach().cpu().nan_to_num(7.0, torch.inf, -torch.inf)


def _same(got: Tensor, wanted: Tensor) -> bool:
    return calls.same_bits(_settled(got), _settled(wanted)) and torch.equal(
        got.isnan().cpu(), wanted.isnan().cpu()
    )


def _require_bits(name: str, got: Tensor, wanted: Tensor, rounded: Tensor) -> None:
    if got.dtype is not wanted.dtype:
        raise CheckFailed(f"{name} of {wanted.dtype}", got.dtype)
    if _same(got, wanted) or _same(got, rounded):
        return
    at = tuple((_settled(got) != _settled(wanted)).nonzero()[:1].flatten().tolist())
    if not at and got.dim():  # no value differs, so a sign of zero or a NaN does
        at = (0,) * got.dim()
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
