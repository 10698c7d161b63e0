"""The operators a compiler sees: one for each family, each carrying its Problem as text.

A captured user function travels through torch.compile, torch.export and AOTInductor as *data*: the canonical
text of its graph inside the text of the Problem, an ordinary string argument, beside the tensors it captured.
So an operator here is an ordinary ``torch.library`` operator, with nothing registered on the side that a
serialised program could lose. Eager calls do not come through here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchhal.operands import AttentionOperands
from torchhal.problems import Plan, Problem
from torchhal.selection import Route, fast_cache, select

if TYPE_CHECKING:
    from torchhal.attention import Call

library = torch.library.Library("torchhal", "DEF")

_ATTENTION = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor[] operands, str fields, float scale, "
    "float dropout_p, str problem, str backend"
)
library.define(f"attention({_ATTENTION}) -> (Tensor, Tensor)")
library.define(f"attention_backward(Tensor grad_out, Tensor grad_lse, int[] wanted, {_ATTENTION}) -> Tensor[]")

_plans: dict[tuple[str, str], tuple[Problem, Plan]] = fast_cache()


def planned(problem: str, backend: str) -> tuple[Any, Plan]:
    """The problem of a text and the plan its backend made for it, by one dictionary look-up."""
    found = _plans.get((problem, backend))
    if found is None:
        question = Problem.from_text(problem)
        plan = select(question, backend).plan
        assert plan is not None
        found = _plans[problem, backend] = (question, plan)
    return found


# ---------------------------------------------------------------------------- layout of results


def empty_attention_output(query: Tensor, value: Tensor) -> Tensor:
    """Uninitialised output of an attention operator: the query's order of dimensions, packed.

    Transformers keep (B, L, H, E) tensors and pass transposed views; giving the result the same order makes
    the transposition back free, as torch's own attention does on CPU.
    """
    sizes = (*query.shape[:-1], value.shape[-1])
    if query.dim() == 4 and query.stride(1) < query.stride(2):
        batch, heads, length, size = sizes
        return query.new_empty((batch, length, heads, size)).transpose(1, 2)
    return query.new_empty(sizes)


def empty_lse(query: Tensor, wanted: bool) -> Tensor:
    """Uninitialised LSE, contiguous; without elements when it is not wanted."""
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    return query.new_empty(query.shape[:-1] if wanted else (0,), dtype=dtype)


def _settle(result: Tensor, like: Tensor) -> Tensor:
    """``result`` with the strides that the fake formula promised; a copy only where they differ."""
    return result if result.stride() == like.stride() else like.copy_(result)


# ---------------------------------------------------------------------------- attention


def attention(route: Route, call: Call, scale: float) -> Tensor | tuple[Tensor, Tensor]:
    """Record ``call`` as one operator for the backend that ``route`` chose."""
    tensors, fields = flatten_operands(call.operands)
    assert route.chosen is not None
    arguments = (call.query, call.key, call.value, call.attn_mask, tensors, fields, scale)
    dropout_p = 0.0 if call.operands is None else call.operands.dropout_p
    out, lse = torch.ops.torchhal.attention(*arguments, dropout_p, route.problem.text, route.chosen)
    return (out, lse) if call.return_lse else out


def flatten_operands(operands: AttentionOperands | None) -> tuple[list[Tensor], str]:
    """The tensors of ``operands`` as a flat list, and the name of the field of each, separated by commas."""
    if operands is None:
        return [], ""
    named = [("captured", t) for t in operands.captured] + [("mask_captured", t) for t in operands.mask_captured]
    named += [(name, t) for name, t in operands.layout().items()]
    return [t for _, t in named], ",".join(name for name, _ in named)


def unflatten_operands(tensors: Sequence[Tensor], fields: str, dropout_p: float) -> AttentionOperands | None:
    """The inverse of :func:`flatten_operands`."""
    if not tensors:
        return None
    lists: dict[str, list[Tensor]] = {"captured": [], "mask_captured": []}
    layout: dict[str, Any] = {}
    for name, tensor in zip(fields.split(","), tensors, strict=True):
        if name in lists:
            lists[name].append(tensor)
        else:
            layout[name] = tensor
    return AttentionOperands(tuple(lists["captured"]), tuple(lists["mask_captured"]), dropout_p=dropout_p, **layout)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, operands: list[Tensor], fields: str,
    scale: float, dropout_p: float, problem: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    question, plan = planned(problem, backend)
    result = plan.run(query, key, value, attn_mask, scale, unflatten_operands(operands, fields, dropout_p))
    out, lse = result if question.return_lse else (result, empty_lse(query, wanted=False))
    return _settle(out, empty_attention_output(query, value)), lse.contiguous()


def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, operands: list[Tensor], fields: str,
    scale: float, dropout_p: float, problem: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    question, _ = planned(problem, backend)
    return empty_attention_output(query, value), empty_lse(query, question.return_lse)


library.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("torchhal::attention", _attention_fake, lib=library)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, attn_mask, operands, *rest = inputs
    tensors = [query, key, value, *([] if attn_mask is None else [attn_mask]), *operands]
    ctx.save_for_backward(*tensors)
    ctx.has_mask, ctx.rest = attn_mask is not None, rest
    ctx.wanted = [i for i, t in enumerate(tensors) if t.requires_grad]


def _attention_autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    query, key, value, *others = ctx.saved_tensors
    attn_mask = others.pop(0) if ctx.has_mask else None
    arguments = (query, key, value, attn_mask, others, *ctx.rest)
    grads = torch.ops.torchhal.attention_backward(grad_out, grad_lse, ctx.wanted, *arguments)
    full: list[Tensor | None] = [None] * len(ctx.saved_tensors)
    for index, grad in zip(ctx.wanted, grads, strict=True):
        full[index] = grad
    main, mask, rest = full[:3], full[3:4] if ctx.has_mask else [None], full[4:] if ctx.has_mask else full[3:]
    return (*main, *mask, rest, *([None] * len(ctx.rest)))


torch.library.register_autograd("torchhal::attention", _attention_autograd, setup_context=_save_for_backward, lib=library)


def _attention_backward(
    grad_out: Tensor, grad_lse: Tensor, wanted: list[int], query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None, operands: list[Tensor], fields: str, scale: float, dropout_p: float, problem: str, backend: str,
) -> list[Tensor]:  # fmt: skip
    """Recompute the forward pass under autograd and pull the gradients back through it."""
    question, plan = planned(problem, backend)
    masks = [] if attn_mask is None else [attn_mask]
    leaves = [t.detach() for t in (query, key, value, *masks, *operands)]
    for index in wanted:
        leaves[index].requires_grad_()
    q, k, v, *others = leaves
    mask = others.pop(0) if masks else None
    with torch.enable_grad():
        result = plan.run(q, k, v, mask, scale, unflatten_operands(others, fields, dropout_p))
    outputs, cotangents = (result, (grad_out, grad_lse)) if question.return_lse else ((result,), (grad_out,))
    inputs = [leaves[index] for index in wanted]
    grads = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, materialize_grads=True)
    return [g.contiguous() for g in grads]


def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor, wanted: list[int], query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None, operands: list[Tensor], *rest: Any,
) -> list[Tensor]:  # fmt: skip
    tensors = [query, key, value, *([] if attn_mask is None else [attn_mask]), *operands]
    return [tensors[index].new_empty(tensors[index].shape) for index in wanted]


library.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("torchhal::attention_backward", _attention_backward_fake, lib=library)
