"""Offsets that 32 bits can not hold: what lies more than 2**31 elements apart has to be found where it lies.

Nothing as large is computed or filled. A tensor of a few elements is laid into memory that nobody else touches, so that
its first and last element are further apart than an int32 counts; a host gives such memory without spending any.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Final

import torch

from torchhal.errors import Unsupported
from torchhal_conformance import calls
from torchhal_conformance.checks.exactness import require_same
from torchhal_conformance.families import attention, foreach, matmul
from torchhal_conformance.families.foreach import FAR, apart
from torchhal_conformance.model import Check, Explanation, Inputs, Measured, Outputs, Sample

NARROW: Final = (torch.bfloat16, torch.float16)
"""Element types of two bytes, in which that many elements are 4 GiB."""
ROOM: Final = 5 << 30
"""Bytes that a device has to have left."""


def require_room(device: torch.device) -> None:
    """See to it that a device has memory for one tensor whose ends lie far apart; a host need not have any.

    Raises:
        Unsupported: it has not; says how much there is.
    """
    free = _free(device)
    if free is not None and free < ROOM:
        raise Unsupported(
            f"offsets beyond 2**31 elements need {ROOM >> 30} GiB free on {device}, which has {free / 2**30:.1f}; "
            "end what else uses it, or run on a larger device"
        )


def _free(device: torch.device) -> int | None:
    """Bytes that can still be allocated on an accelerator; None where memory is not spent until it is touched."""
    if device.type == "cpu":
        return None
    kept = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return int(torch.accelerator.get_memory_info(device)[0]) + kept


Operands = dict[str, tuple[int, ...]]
"""Names of inputs and the dimensions along which each is spread, one at a time."""


def spread(backend: str, sample: Sample, seed: int, operands: Operands) -> Measured:
    """One operand after the other spread along one dimension; the bits must be those of operands that lie together."""
    device = calls.device_of(backend)
    inputs = calls.make(sample, backend, seed)
    before = calls.call(sample, backend, inputs)
    for name, dimensions in operands.items():
        for dimension in dimensions:
            require_room(device)
            after = _call_spread(backend, sample, inputs, name, dimension)
            what = f"with {name} spread over more than {FAR} elements along dimension {dimension}"
            require_same(before, after, what)
    return Measured()


def _call_spread(backend: str, sample: Sample, inputs: Inputs, name: str, dimension: int) -> Outputs:
    with calls.harness():
        changed = {**inputs, name: apart(inputs[name], dimension)}
    return calls.call(sample, backend, changed)


# ---------------------------------------------------------------------------- attention


def _attention_samples() -> Iterator[Sample]:
    for layout, dtype in itertools.product(("dense", "varlen", "paged"), NARROW):
        yield attention.sample(
            attention.Call(layout=layout, dtype=dtype, heads=2, kv_heads=2, rows=3, keys=7)
        )


def attention_apart(backend: str, sample: Sample, seed: int) -> Measured:
    """Batches, heads, rows, tokens and pages that lie far apart."""
    dimensions: tuple[int, ...] = (0, 1) if sample.needs.choice == "varlen" else (0, 1, 2)
    return spread(backend, sample, seed, dict.fromkeys(("query", "key", "value"), dimensions))


# ---------------------------------------------------------------------------- matrix product


def _matmul_samples() -> Iterator[Sample]:
    for dtype in NARROW:
        yield matmul.sample(matmul.Call(dtype=dtype, rows=5, columns=16, inner=32))
        yield matmul.sample(
            matmul.Call(dtype=dtype, a_batch=(2,), b_batch=(2,), rows=5, columns=16, inner=32)
        )


def matmul_apart(backend: str, sample: Sample, seed: int) -> Measured:
    """Batches and rows that lie far apart."""
    dimensions = (0, 1) if "batched" in sample.tags else (0,)
    return spread(backend, sample, seed, dict.fromkeys(("a", "b"), dimensions))


# ---------------------------------------------------------------------------- foreach


def _foreach_samples() -> Iterator[Sample]:
    for dtype in NARROW:
        yield foreach.sample(foreach.Call("chain", dtypes=(dtype,)))
        yield foreach.sample(foreach.Call("chain", dtypes=(dtype,), out="apart"))


def foreach_apart(backend: str, sample: Sample, seed: int) -> Measured:
    """Operands whose rows lie far apart, or destinations whose rows do."""
    if "in_place" not in sample.tags:
        return spread(backend, sample, seed, dict.fromkeys(("x0_1", "x1_1"), (0,)))
    require_room(calls.device_of(backend))
    inputs = calls.make(sample, backend, seed)
    with calls.harness():
        wanted = sample.plain(inputs)
    after = calls.call(sample, backend, inputs)
    require_same(wanted, after, f"in destinations spread over more than {FAR} elements")
    return Measured()


# ---------------------------------------------------------------------------- the checks


_TESTS: Final = (
    "Lays {what} into memory so that its first and last element are more than 2**31 elements apart, one operand and one "
    "dimension after the other; results must be those of the same values side by side, bit for bit."
)
_DEBUG: Final = (
    "The message names the operand and the dimension. Look for an index multiplied by a stride in 32 bits before it is "
    "widened, on the host as well as in the kernel; a stride that itself fits is no excuse."
)


def _check(
    family: str,
    what: str,
    why: str,
    samples: Callable[[], Iterator[Sample]],
    run: Callable[[str, Sample, int], Measured],
) -> Check:
    explanation = Explanation(_TESTS.format(what=what), why, _DEBUG)
    return Check(f"{family}.far_apart", explanation, samples, run)


def checks() -> Iterator[Check]:
    """One for each family of tensors."""
    yield _check(
        "attention",
        "query, key, value or the pool of pages",
        "Block offsets computed in 32 bits gave silently wrong numbers beyond 2**31 elements (flash-linear-attention "
        "#1080), and a stride that fits overflowed once it was multiplied by a row (NATTEN #347). Pools of pages that "
        "large are what servers run with.",
        _attention_samples,
        attention_apart,
    )
    yield _check(
        "matmul",
        "one matrix",
        "A row's offset computed in 32 bits read the wrong rows of a matrix beyond 2**31 elements, with errors of up to "
        "a quarter and no exception (mlx #3591).",
        _matmul_samples,
        matmul_apart,
    )
    yield _check(
        "foreach",
        "a tensor of a list, or a destination,",
        "A kernel that computed strided offsets in 32 bits wrote a model's state to the wrong rows: its answers fell from "
        "87 to 60 per cent right, and nothing failed (FlagGems #6411).",
        _foreach_samples,
        foreach_apart,
    )
