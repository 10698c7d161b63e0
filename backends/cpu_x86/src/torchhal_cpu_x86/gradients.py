"""Differentiable attention: one native operator for the forward pass and one for the gradients of all its tensors.

``differentiable_attention`` computes what ``flex_attention`` does and keeps, for the backward pass, its results and a
text that describes the gradient of the ``score_mod``; ``attention_backward`` computes the scores again, tile by tile,
so nothing of size L x S is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torchhal.derivatives import first_derivatives, is_transformed
from torchhal.pointwise import Graph
from torchhal.pointwise.differentiate import differentiate
from torchhal.pointwise.graph import Node
from torchhal.problems import AttentionProblem
from torchhal.reference import attention as reference
from torchhal.reference.attention import score_dtype
from torchhal_cpu_x86 import programs

Run = Callable[..., Any]

LAYOUTS: Final = {"dense": 0, "varlen": 1, "paged": 2}
"""As ``native/src/flex_call.hpp`` numbers them."""

FEATURES: Final = frozenset({"backward", "mask_gradient", "captured_gradient"})
"""Features of a problem that ask for gradients."""


def are_wanted(problem: AttentionProblem) -> bool:
    """Whether gradients are to reach a tensor of the call."""
    return not FEATURES.isdisjoint(problem.features)


class Description(NamedTuple):
    """What the text of a call's gradient says."""

    mask: bool
    """Whether the gradient of ``attn_mask`` is wanted."""
    contributions: tuple[tuple[int, int, int], ...]
    """Captured tensor, first result that is an index, result that is added there."""
    words: tuple[int, ...]
    """The program of the ``score_mod``'s gradient."""

    def text(self) -> str:
        """Whole numbers, as ``native/src/torch_gradients.cpp`` reads them."""
        flat = [number for contribution in self.contributions for number in contribution]
        numbers = [int(self.mask), len(self.contributions), *flat, len(self.words), *self.words]
        return " ".join(map(str, numbers))

    @staticmethod
    def of_text(text: str) -> Description:
        """The inverse of :meth:`text`."""
        mask, count, *rest = map(int, text.split())
        flat, words = rest[: 3 * count], rest[3 * count + 1 :]
        contributions = tuple(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
        return Description(bool(mask), contributions, tuple(words))

    @property
    def captured(self) -> tuple[int, ...]:
        """Which captured tensors have a gradient, in the order of their sums."""
        return tuple(sorted({captured for captured, _, _ in self.contributions}))


def describe(problem: AttentionProblem) -> Description:
    """The gradient of a problem's functions and mask."""
    mask = "mask_gradient" in problem.features
    if problem.score_mod is None:
        return Description(mask, (), ())
    contributions, words = _gradient_of(problem.score_mod)
    return Description(mask, contributions if "captured_gradient" in problem.features else (), words)


def _gradient_of(score_mod: Graph) -> tuple[tuple[tuple[int, int, int], ...], tuple[int, ...]]:
    """Contributions and program; the first result is the gradient of the score."""
    gradient = differentiate(_as_score(score_mod))
    contributions = tuple(
        (c.captured, c.indices[0] if c.indices else 0, c.value) for c in gradient.contributions
    )
    return contributions, programs.encode(gradient.graph)


def _as_score(score_mod: Graph) -> Graph:
    """With the cast that the kernels apply to a result of another type than the score's, whose gradient has that too."""
    (output,), score = score_mod.outputs, score_mod.inputs[0].dtype
    if score_mod.nodes[output].dtype is score:
        return score_mod
    nodes = (*score_mod.nodes, Node("cast", (output,), score))
    return replace(score_mod, nodes=nodes, outputs=(len(score_mod.nodes),))


def outside_transforms(run: Run, problem: AttentionProblem) -> Run:
    """``run``, with plain torch in its place inside the transforms of torch.func and forward-mode differentiation.

    The formulas below serve the backward pass of torch.autograd. A transform would get an error from them, and a tangent
    would be lost.
    """
    plain = reference.plan(problem).run
    return lambda *arguments: (plain if is_transformed() else run)(*arguments)


# ---------------------------------------------------------------------------- formulas for autograd


def register() -> None:
    """Give ``differentiable_attention`` its derivatives."""
    torch.library.register_autograd(
        "torchhal_cpu_x86::differentiable_attention", _backward, setup_context=_save
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, operands, *ctx.rest = inputs
    out, lse, max_scores = output
    ctx.save_for_backward(query, key, value, *operands, out, lse)
    ctx.mark_non_differentiable(max_scores)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_max_scores: Tensor | None
) -> tuple[Any, ...]:
    query, key, value, *operands, out, lse = ctx.saved_tensors
    description, scale, text = ctx.rest
    nothing: list[Tensor | None] = [None] * len(operands)
    if grad_out is None and grad_lse is None:
        return None, None, None, nothing, None, None, None
    above = torch.zeros_like(out) if grad_out is None else grad_out
    lse_above = lse.new_empty(0) if grad_lse is None else grad_lse
    with torch.no_grad():
        results = torch.ops.torchhal_cpu_x86.attention_backward(
            query, key, value, operands, description, scale, text, above, lse_above, out, lse
        )
    if torch.is_grad_enabled():  # with create_graph
        results = first_derivatives(
            "cpu_x86", "attention", results, (query, key, value, *operands, above, lse_above)
        )
    *found, sums = results
    main = [gradient.to(query.dtype) for gradient in found]  # those of pages are float32
    return *main, _share(sums, operands, description, Description.of_text(text)), None, None, None


def _share(
    sums: Tensor, operands: Sequence[Tensor], description: str, gradient: Description
) -> list[Tensor | None]:
    """Each operand's gradient out of the flat sums: the mask's, then those of captured tensors."""
    has_mask = int(description.split(" ", 4)[3])
    places = ([0] if gradient.mask else []) + [has_mask + captured for captured in gradient.captured]
    found: list[Tensor | None] = [None] * len(operands)
    parts = torch.split(sums, [operands[place].numel() for place in places]) if places else ()
    for place, part in zip(places, parts, strict=True):
        found[place] = part.view(operands[place].shape).to(operands[place].dtype)
    return found


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: list[Tensor],
    description: str,
    scale: float,
    gradient: str,
    *results: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of ``attention_backward`` for fake tensors."""
    has_mask, found = int(description.split(" ", 4)[3]), Description.of_text(gradient)
    summed = ([operands[0]] if found.mask else []) + [operands[has_mask + i] for i in found.captured]
    kind = score_dtype(query.dtype) if int(description.split(" ", 1)[0]) == LAYOUTS["paged"] else query.dtype
    keys, values = (torch.empty_like(tensor, dtype=kind) for tensor in (key, value))
    return (
        torch.empty_like(query),
        keys,
        values,
        query.new_empty(sum(t.numel() for t in summed), dtype=torch.float64),
    )
