"""Plans for the fused matrix product: packed panels, captured functions by the vector machine, gradients by recomputation."""

from __future__ import annotations

import torch

from torchhal import Decline, Plan
from torchhal.problems import MatmulProblem
from torchhal.products import packed
from torchhal.products.product import runner, wants_gradients
from torchhal.reference import matmul as reference
from torchhal_cpu_x86 import chains, hardware, native, products, programs


def plan(problem: MatmulProblem) -> Plan | Decline:
    """The native plan for a problem, or why this machine has none."""
    refusal = hardware.decline()
    if refusal is not None:
        return refusal
    refusal = None if problem.packing is None else packed.decline(problem)
    if refusal is not None:
        return refusal
    unknown = sorted(str(dtype) for dtype in set(problem.out_dtypes) - programs.TYPES.keys())
    if unknown:
        return Decline(
            "out_dtype", f"results are written in types of the vector machine, not {', '.join(unknown)}"
        )
    compute = reference.compute_dtype(problem)
    kernel = torch.bfloat16 if problem.dtypes == {torch.bfloat16} else compute
    return Plan(
        run=runner(problem, "cpu_x86", products.multiply),
        description=f"native, {native.load().get_isa(kernel)}, packed panels, one rounding",
        differentiable=wants_gradients(problem),
        bind=None if problem.packing is None else chains.bind,
        workspace="24 MB, and 1 MB for each thread",
    )
