"""Plans for foreach: the function as a native program, in one parallel region over all lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torchhal import Decline, Plan
from torchhal.derivatives import is_transformed
from torchhal.foreach_columns import LIST, NUMBER, NUMBERS, SHARED
from torchhal.foreach_plans import Lists, Passes, Results, learns, runner
from torchhal.operands import PLAIN
from torchhal.problems import ForeachProblem
from torchhal.reference.foreach import depends_on
from torchhal_cpu_x86 import hardware, maps, native

_PASSES: Final = Passes(maps.run, maps.reduce)


def plan(problem: ForeachProblem) -> Plan | Decline:
    """The native plan for a problem, or why this machine has none."""
    refusal = hardware.decline()
    if refusal is not None:
        return refusal
    if len(problem.operands) > maps.MOST_INPUTS:
        return Decline("too_many_operands", f"functions of up to {maps.MOST_INPUTS} operands are served")
    return Plan(
        run=runner(problem, _PASSES),
        description=f"native, {native.load().get_isa(torch.float32)}, one pass over all lists",
        differentiable=True,
        workspace="copies of what is not contiguous or has a shape of its own",
        direct=None if learns(problem) else _direct(problem),
    )


def _direct(problem: ForeachProblem) -> Callable[..., Results | None] | None:
    """The ``direct`` of a plan: the native operator, which looks at the tensors itself."""
    (graph, *others) = problem.functions
    listed = {index for index, how in enumerate(problem.operands) if how == "list"}
    if others or graph.captured or not all(listed & needed for needed in depends_on(graph)):
        return None
    operator = torch.ops.torchhal_cpu_x86.foreach.default
    ready: dict[tuple[object, ...], tuple[maps.Prepared, int]] = {}

    def direct(operands: Sequence[Any], out: Lists | None) -> Results | None:
        gathered = _gathered(operands, out)
        if gathered is None or is_transformed() or torch._C._len_torch_dispatch_stack():
            return None
        kinds, targets, tensors, numbers = gathered
        found = ready.get((kinds, targets))
        if found is None:
            places = targets or (maps.NEW,) * len(graph.outputs)
            program = maps.prepared(graph, kinds, places, problem.reduction)
            found = ready[kinds, targets] = program, len(graph.outputs)
        program, outputs = found
        with torch._C._AutoDispatchBelowAutograd():
            made, served = operator(tensors, numbers, program.number)
        if not served:
            return None
        if out is not None:
            if not native.load().notes_writes:
                torch.autograd.graph.increment_version([t for items in out for t in items])
            return out  # type: ignore[return-value]
        if problem.reduction is not None:
            return maps.settled(graph, made, problem.reduction)
        length = len(made) // outputs
        return tuple(made[start : start + length] for start in range(0, len(made), length))

    return direct


def _gathered(
    operands: Sequence[Any], out: Lists | None
) -> tuple[tuple[int, ...], tuple[int, ...], list[Tensor], list[float]] | None:
    """Kinds and targets of a call, its tensors and its numbers; None for what the operator does not take."""
    kinds, tensors, numbers = [], [], []
    for entry in operands:
        if type(entry) is float:
            kinds.append(NUMBER)
            numbers.append(entry)
        elif isinstance(entry, Tensor):
            kinds.append(SHARED)
            tensors.append(entry)
        elif type(entry[0]) is float:
            kinds.append(NUMBERS)
            numbers += entry
        else:
            kinds.append(LIST)
            tensors += entry
    targets = []
    for items in out or ():
        at = next((index for index, entry in enumerate(operands) if entry is items), maps.GIVEN)
        targets.append(at)
        if at == maps.GIVEN:
            tensors += items
    if not set(map(type, tensors)) <= PLAIN or not set(map(type, numbers)) <= {float}:
        return None
    return tuple(kinds), tuple(targets), tensors, numbers
