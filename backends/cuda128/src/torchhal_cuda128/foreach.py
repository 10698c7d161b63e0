"""Plans for foreach: the portable Triton kernel over a table of addresses."""

from __future__ import annotations

from typing import Final

from torchhal.foreach_plans import learns
from torchhal.portable import foreach
from torchhal.portable.foreach_direct import direct
from torchhal.problems import Decline, ForeachProblem, Plan
from torchhal_cuda128 import tiles
from torchhal_cuda128.hardware import Hardware

BLOCKS: Final = foreach.Blocks(elements=1024, warps=4)
"""By an AdamW step of 20 tensors of 16 million float32 on an H100: 3.26 ms, 2048 elements of 8 warps 3.26, of 4 warps 3.38, 512
elements 3.43, 4096 3.40. A second run gave 3.45 for the first two."""


def plan(problem: ForeachProblem, hardware: Hardware) -> Plan | Decline:
    """The plan for a foreach problem on the hardware that was seen."""
    device = tiles.device_of(problem, hardware)
    if isinstance(device, Decline):
        return device
    refusal = foreach.decline(problem)
    if refusal is not None:
        return refusal
    mapper = foreach.Mapper(problem.device, BLOCKS)
    return Plan(
        run=foreach.mapping(problem, mapper),
        description=f"Triton, {device.architecture}, one launch for each kind of tensors",
        differentiable=True,
        workspace="a table of 8 bytes for each tensor, and of 8 for each block of elements",
        direct=None if learns(problem) else direct(problem, mapper),
    )
