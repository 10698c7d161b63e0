"""Plans for attention: the portable Triton kernels with tiles for this device."""

from __future__ import annotations

from torchhal.portable import attention, gradients
from torchhal.problems import AttentionProblem, Decline, Plan
from torchhal_cuda128 import engines, tiles
from torchhal_cuda128.hardware import Hardware, unsuitable


def plan(problem: AttentionProblem, hardware: Hardware) -> Plan | Decline:
    """The plan for an attention problem on the hardware that was seen."""
    index = problem.device.index or 0
    verdict = unsuitable(hardware, index)
    if verdict:
        return verdict
    device = hardware.devices[index]
    tuning = tiles.tuning(device)
    if isinstance(tuning, Decline):
        return tuning
    refusal = attention.decline(problem)
    if refusal is not None:
        return refusal
    run = attention.runner(problem, tuning)
    rule = engines.rule_for(problem, device)
    return Plan(
        run=engines.with_cudnn(run, rule) if isinstance(rule, engines.Rule) else run,
        description=f"Triton, {device.architecture}, tiled prefill and split-key decode"
        + _functions(problem)
        + (f", cuDNN from {rule.least} rows and keys on" if isinstance(rule, engines.Rule) else ""),
        deterministic=True,
        differentiable=gradients.are_wanted(problem),
        workspace="O(B Hq L Ev)",
    )


def _functions(problem: AttentionProblem) -> str:
    """What else the kernels do, for a person."""
    parts = [] if problem.layout == "dense" else [f"{problem.layout} sequences"]
    if problem.score_mod is not None or problem.mask_mod is not None:
        parts.append("functions compiled in")
    if problem.block_size is not None:
        parts.append("empty blocks skipped")
    return "".join(f", {part}" for part in parts)
