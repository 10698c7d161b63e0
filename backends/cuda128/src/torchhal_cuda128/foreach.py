"""Plans for foreach: the portable Triton kernel over a table of addresses."""

from __future__ import annotations

from typing import Final

from torchhal.foreach_plans import learns
from torchhal.portable import foreach
from torchhal.portable.foreach_direct import direct
from torchhal.problems import Decline, ForeachProblem, Plan
from torchhal_cuda128.hardware import Hardware, unsuitable

BLOCKS: Final = foreach.Blocks(elements=1024, warps=4)


def plan(problem: ForeachProblem, hardware: Hardware) -> Plan | Decline:
    """The plan for a foreach problem on the hardware that was seen."""
    index = problem.device.index or 0
    refusal = unsuitable(hardware, index) or foreach.decline(problem)
    if refusal is not None:
        return refusal
    mapper = foreach.Mapper(problem.device, BLOCKS)
    return Plan(
        run=foreach.mapping(problem, mapper),
        description=f"Triton, {hardware.devices[index].architecture}, one launch for each kind of tensors",
        differentiable=True,
        workspace="a table of 8 bytes for each tensor, and of 8 for each block of elements",
        direct=None if learns(problem) else direct(problem, mapper),
    )
