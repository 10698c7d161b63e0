"""Faults in offsets, in what partial results say of themselves, and in foreach lists that share memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torchhal import Capabilities
from torchhal.problems import ForeachClaims
from torchhal_conformance.mutants import Mutant, Run
from torchhal_conformance.mutants.attention import inputs, outputs

# ---------------------------------------------------------------------------- offsets in 32 bits


def _offsets(tensor: Tensor) -> Tensor:
    """Where each element lies in its memory, counted in 32 bits; what falls out of it at one end comes in at the other."""
    offsets = torch.tensor(tensor.storage_offset())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.to(torch.int32).long().remainder(_memory(tensor).numel())


def _memory(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def _is_far(tensor: Tensor) -> bool:
    ends = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and ends >= 2**31


def _wrapped(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_wrapped(item) for item in value)
    if isinstance(value, Tensor) and _is_far(value):
        return _memory(value)[_offsets(value)]
    return value


def _attention_offsets(p: Any, q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, ...]:
    return _wrapped(q), _wrapped(k), _wrapped(v), *rest


def _matmul_offsets(run: Run, problem: Any) -> Run:
    return lambda a, b, *rest: run(_wrapped(a), _wrapped(b), *rest)


def _foreach_offsets(run: Run, problem: Any) -> Run:
    return lambda operands, captured, out: run([_wrapped(o) for o in operands], captured, out)


def _destination_offsets(run: Run, problem: Any) -> Run:
    def faulty(operands: Any, captured: Any, out: Any) -> Any:
        if out is None:
            return run(operands, captured, None)
        return _written(run(operands, captured, None), out, _store_wrapped)

    return faulty


def _store_wrapped(place: Tensor, value: Tensor) -> None:
    if _is_far(place):
        _memory(place)[_offsets(place)] = value.to(place.dtype).expand(place.shape)
    else:
        place.copy_(value)


def _stride_of_zero(p: Any, q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, ...]:
    """A row that is expanded is taken for the first of as many that follow it in memory."""
    if p.layout != "dense" or q.dim() != 4 or q.stride(2) != 0 or q.shape[2] < 2 or not q.numel():
        return q, k, v, *rest
    return torch.cat([q[:, :, :1], torch.zeros_like(q[:, :, 1:])], 2), k, v, *rest


# ---------------------------------------------------------------------------- partial results


def _lse_of_nothing(p: Any, out: Tensor, lse: Any, q: Any, k: Any, *rest: Any) -> Any:
    nothing = p.layout == "dense" and k.shape[2] == 0
    return out, torch.zeros_like(lse) if nothing and lse is not None else lse


def _lse_of_masked(p: Any, out: Tensor, lse: Any, q: Any, k: Any, v: Any, mask: Any, *rest: Any) -> Any:
    if lse is None or mask is None:
        return out, lse
    return out, torch.where(torch.isneginf(lse), math.log(k.shape[2] + 1.0), lse)


def _lse_from_a_floor(p: Any, out: Tensor, lse: Any, *given: Any) -> Any:
    """A running maximum that begins at -100."""
    return out, None if lse is None else torch.where(torch.isneginf(lse), lse, lse.clamp(min=-100.0))


# ---------------------------------------------------------------------------- captured tensors


def _no_gradient_from_pages(run: Run, problem: Any) -> Run:
    def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
        if operands is not None and problem.layout == "paged":
            operands = dataclasses.replace(operands, captured=tuple(t.detach() for t in operands.captured))
        return run(q, k, v, mask, scale, operands)

    return faulty


# ---------------------------------------------------------------------------- one primitive


def _without_primitive(name: str) -> Callable[[Run, Any], Run]:
    """Where a graph holds a primitive, results are one too large, integers off by their last bit."""

    def make(run: Run, problem: Any) -> Run:
        graphs = [graph for graph in problem.functions if any(n.primitive == name for n in graph.nodes)]
        if not graphs:
            return run

        def faulty(operands: Any, captured: Any, out: Any) -> Any:
            results = run(operands, captured, None)
            found = tuple([t + 1 if t.is_floating_point() else t ^ 1 for t in column] for column in results)
            return found if out is None else _written(found, out, Tensor.copy_)

        return faulty

    return make


def _bare(dtype: torch.dtype) -> Capabilities:
    """Lists of one type and nothing else, so that few cases are tried before the one that kills."""
    return Capabilities(foreach=ForeachClaims(dtypes=frozenset({dtype})))


# ---------------------------------------------------------------------------- lists that share memory


def _written(results: Any, out: Any, store: Callable[[Tensor, Tensor], Any]) -> Any:
    for places, values in zip(out, results, strict=True):
        for place, value in zip(places, values, strict=True):
            store(place, value)
    return tuple(list(places) for places in out)


def _by_address(run: Run, problem: Any) -> Run:
    """What was computed for a tensor is taken for it again, whatever number or tensor goes with it."""

    def faulty(operands: Any, captured: Any, out: Any) -> Any:
        results = run(operands, captured, None)
        first = next(o for o, how in zip(operands, problem.operands, strict=True) if how == "list")
        known: dict[int, int] = {}
        places = [known.setdefault(t.data_ptr(), i) if t.numel() else i for i, t in enumerate(first)]
        found = tuple([column[i].clone() for i in places] for column in results)
        return found if out is None else _written(found, out, Tensor.copy_)

    return faulty


def _output_by_output(run: Run, problem: Any) -> Run:
    """The first result is written before the second is computed, over operands that the second reads."""

    def faulty(operands: Any, captured: Any, out: Any) -> Any:
        if out is None:
            return run(operands, captured, None)
        for number, places in enumerate(out):
            _written((run(operands, captured, None)[number],), (places,), Tensor.copy_)
        return tuple(list(places) for places in out)

    return faulty


def _rows_of_elements(run: Run, problem: Any) -> Run:
    """Destinations are written as if their elements lay one behind the other."""

    def faulty(operands: Any, captured: Any, out: Any) -> Any:
        if out is None:
            return run(operands, captured, None)
        return _written(run(operands, captured, None), out, _store_densely)

    return faulty


def _store_densely(place: Tensor, value: Tensor) -> None:
    size = place.untyped_storage().nbytes() // place.element_size() - place.storage_offset()
    flat = value.to(place.dtype).expand(place.shape).reshape(-1)[:size]
    place.as_strided(flat.shape, (1,)).copy_(flat)


FAR: Final = ("attention.far_apart",)
STRIDES: Final = ("attention.broadcast",)
MERGE: Final = ("attention.merge",)
BITS: Final = ("foreach.bitwise",)

MUTANTS: Final = (
    Mutant("attention_int32", "offsets of attention's inputs are 32 bits wide", FAR, inputs(_attention_offsets)),
    Mutant("matmul_int32", "offsets of matrices are 32 bits wide", ("matmul.far_apart",), _matmul_offsets, "matmul"),
    Mutant("foreach_int32", "offsets of operands are 32 bits wide", ("foreach.far_apart",), _foreach_offsets, "foreach"),
    Mutant(
        "foreach_out_int32", "offsets of destinations are 32 bits wide", ("foreach.far_apart",), _destination_offsets,
        "foreach",
    ),
    Mutant("stride_of_zero", "rows of an expanded query are read from behind it", STRIDES, inputs(_stride_of_zero)),
    Mutant("lse_of_nothing", "a partition without keys has an LSE of 0", MERGE, outputs(_lse_of_nothing)),
    Mutant("lse_of_masked", "a partition of masked keys counts them in its LSE", MERGE, outputs(_lse_of_masked)),
    Mutant("lse_floor", "an LSE is never below -100", MERGE, outputs(_lse_from_a_floor)),
    Mutant(
        "no_gradient_from_pages", "captured tensors of paged calls get no gradient", ("attention.gradients",),
        _no_gradient_from_pages,
    ),
    Mutant("by_address", "a tensor that a list holds twice is computed once", BITS, _by_address, "foreach"),
    Mutant("output_by_output", "a result is written before the next one is computed", BITS, _output_by_output, "foreach"),
    Mutant("dense_destinations", "destinations are written as if they were contiguous", BITS, _rows_of_elements, "foreach"),
    Mutant(
        "no_erfinv", "one primitive computes something else", ("foreach.numbers",), _without_primitive("erfinv"), "foreach",
        capabilities=_bare(torch.float32),
    ),
    Mutant(
        "no_shift_right", "one primitive of integers computes something else", BITS, _without_primitive("shift_right"),
        "foreach", capabilities=_bare(torch.int32),
    ),
)  # fmt: skip
