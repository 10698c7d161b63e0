"""The operators a compiler sees: one for each family, each carrying its Problem as text.

A captured user function travels through torch.compile, torch.export and AOTInductor as *data*: the canonical
text of its graph inside the text of the Problem, an ordinary string argument, beside the tensors it captured.
So an operator here is an ordinary ``torch.library`` operator, with nothing registered on the side that a
serialised program could lose. Eager calls do not come through here, and neither do plans that record an
operator of their own.

Every family's operator has the same form: all tensors in one flat list, what they are and the numbers beside
them as JSON, the Problem, and the backend. Gradients recompute the call under autograd.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchhal._caches import fast_cache
from torchhal.problems import Plan, Problem
from torchhal.registry import blame
from torchhal.selection import Route, select

library: Any = torch.library.Library("torchhal", "DEF")  # type: ignore[no-untyped-call]

Description = dict[str, Any]


@dataclass(frozen=True)
class Operator:
    """How a family's operator computes, and what its results look like."""

    run: Callable[[Plan, Any, Sequence[Tensor], Description], Sequence[Tensor]]
    """``(plan, problem, tensors, description)`` to results."""
    shapes: Callable[[Any, Sequence[Tensor], Description], list[Tensor]]
    """``(problem, tensors, description)`` to uninitialised results of the right shapes, types and strides."""


OPERATORS: dict[str, Operator] = {}

_plans: dict[tuple[str, str], tuple[Problem, Plan]] = fast_cache()


def call(route: Route, tensors: list[Tensor], description: Description) -> list[Tensor]:
    """Record one call for the backend that ``route`` chose."""
    operator = getattr(torch.ops.torchhal, route.problem.family)
    return operator(tensors, json.dumps(description), route.problem.text, route.chosen)  # type: ignore[no-any-return]


def planned(problem: str, backend: str) -> tuple[Any, Plan]:
    """The problem of a text and the plan its backend made for it, by one dictionary look-up."""
    found = _plans.get((problem, backend))
    if found is None:
        question = Problem.from_text(problem)
        plan = select(question, backend).plan
        assert plan is not None
        found = _plans[problem, backend] = (question, plan)
    return found


def define(family: str, operator: Operator) -> None:
    """Register the operator of a family, with its fake and autograd formulas."""
    OPERATORS[family] = operator
    arguments = "Tensor[] tensors, str call, str problem, str backend"
    library.define(f"{family}({arguments}) -> Tensor[]")
    library.define(f"{family}_backward(Tensor?[] gradients, int[] wanted, {arguments}) -> Tensor[]")

    def forward(tensors: list[Tensor], call: str, problem: str, backend: str) -> list[Tensor]:
        results = _run(family, tensors, call, problem, backend)
        promised = fake([_without_data(tensor) for tensor in tensors], call, problem, backend)
        return [_settle(result, like) for result, like in zip(results, promised, strict=True)]

    def fake(tensors: list[Tensor], call: str, problem: str, backend: str) -> list[Tensor]:
        return operator.shapes(planned(problem, backend)[0], tensors, json.loads(call))

    def backward(
        gradients: list[Tensor | None], wanted: list[int], tensors: list[Tensor], *rest: str
    ) -> list[Tensor]:
        return _recompute(family, gradients, wanted, tensors, *rest)

    def backward_fake(gradients: Any, wanted: list[int], tensors: list[Tensor], *rest: str) -> list[Tensor]:
        return [tensors[index].new_empty(tensors[index].shape) for index in wanted]

    for name, function, formula in ((family, forward, fake), (f"{family}_backward", backward, backward_fake)):
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"torchhal::{name}", formula, lib=library)
    formulas = {"setup_context": _save, "lib": library}
    torch.library.register_autograd(f"torchhal::{family}", _autograd(family), **formulas)


def _run(family: str, tensors: Sequence[Tensor], call: str, problem: str, backend: str) -> Sequence[Tensor]:
    question, plan = planned(problem, backend)
    try:
        return OPERATORS[family].run(plan, question, tensors, json.loads(call))
    except Exception as error:
        blame(error, backend)
        raise


def _settle(result: Tensor, like: Tensor) -> Tensor:
    """``result`` with the strides that the fake formula promised; a copy only where they differ."""
    if result.stride() == like.stride():
        return result
    return result.new_empty_strided(like.shape, like.stride()).copy_(result)


def _without_data(tensor: Tensor) -> Tensor:
    """A stand-in on the meta device, so that asking for the promised strides computes and allocates nothing."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


# ---------------------------------------------------------------------------- gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, *ctx.rest = inputs
    ctx.save_for_backward(*tensors)
    ctx.wanted = [index for index, tensor in enumerate(tensors) if tensor.requires_grad]


def _autograd(family: str) -> Callable[..., tuple[Any, ...]]:
    def formula(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
        operator = getattr(torch.ops.torchhal, f"{family}_backward")
        found = operator(gradients, ctx.wanted, ctx.saved_tensors, *ctx.rest)
        full: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        for index, gradient in zip(ctx.wanted, found, strict=True):
            full[index] = gradient
        return (full, *([None] * len(ctx.rest)))

    return formula


def _recompute(
    family: str,
    gradients: Sequence[Tensor | None],
    wanted: Sequence[int],
    tensors: Sequence[Tensor],
    *rest: str,
) -> list[Tensor]:
    """Run the call again under autograd and pull the gradients back through it."""
    leaves = [tensor.detach() for tensor in tensors]
    inputs = [leaves[index].requires_grad_() for index in wanted]
    with torch.enable_grad():
        results = _run(family, leaves, *rest)
    live = [(r, g) for r, g in zip(results, gradients, strict=True) if r.requires_grad and g is not None]
    if not live:
        return [torch.zeros_like(leaf, memory_format=torch.contiguous_format) for leaf in inputs]
    outputs, cotangents = zip(*live, strict=True)
    found = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, materialize_grads=True)
    return [gradient.contiguous() for gradient in found]
