"""Plans for attention: the portable Triton kernels with tiles for this device, behind an engine where one is faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchhal.portable import attention, gradients
from torchhal.portable.tiles import Tuning
from torchhal.problems import AttentionProblem, Decline, Plan
from torchhal_cuda128 import engines, tiles
from torchhal_cuda128.hardware import Device, Hardware


def plan(problem: AttentionProblem, hardware: Hardware) -> Plan | Decline:
    """The plan for an attention problem on the hardware that was seen."""
    device = tiles.device_of(problem, hardware)
    if isinstance(device, Decline):
        return device
    refusal = attention.decline(problem)
    if refusal is not None:
        return refusal
    tuning = tiles.tuning(device)
    usable = [name for name, why in engines.able(problem, device, hardware.fa4).items() if why is None]
    rule = _rule(problem, device, usable)
    variants = {name: _run(problem, tuning, name, device) for name in ("triton", *usable)}
    return Plan(
        run=variants["triton" if rule is None else rule.engine],
        variants=variants if usable else {},
        description=f"Triton, {device.architecture}, tiled prefill and split-key decode"
        + _functions(problem)
        + ("" if rule is None else f", {engines.NAMES[rule.engine]} from {rule.least} rows and keys on"),
        deterministic=True,
        differentiable=gradients.are_wanted(problem),
        workspace="O(B Hq L Ev)",
    )


def _rule(problem: AttentionProblem, device: Device, usable: list[str]) -> engines.Rule | None:
    """The rule of the engine that was measured to be faster, of those that the suite has judged."""
    rules = (engines.rule_for(name, problem, device) for name in usable if name in engines.JUDGED)
    return next((rule for rule in rules if isinstance(rule, engines.Rule)), None)


def _run(problem: AttentionProblem, tuning: Tuning, name: str, device: Device) -> Callable[..., Any]:
    """The problem's run by one engine, ``triton`` for none."""
    if name == "triton":
        return attention.runner(problem, tuning)
    rule = engines.rule_for(name, problem, device)
    least = rule.least if isinstance(rule, engines.Rule) else engines.UNMEASURED
    return attention.runner(problem, tuning, engines.engine(name, problem, least))


def _functions(problem: AttentionProblem) -> str:
    """What else the kernels do, for a person."""
    parts = [] if problem.layout == "dense" else [f"{problem.layout} sequences"]
    if problem.score_mod is not None or problem.mask_mod is not None:
        parts.append("functions compiled in")
    if problem.block_size is not None:
        parts.append("empty blocks skipped")
    return "".join(f", {part}" for part in parts)
