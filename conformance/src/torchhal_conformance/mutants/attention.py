"""Faults in attention's arithmetic and indexing."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.reference.attention import attention as honest_attention
from torchhal_conformance.mutants import Change, Mutant, Run

NUMBERS: Final = ("attention.numbers",)


def inputs(change: Callable[..., tuple[Any, ...]], when: Callable[[Any], bool] = lambda p: True) -> Change:
    """A fault in what goes in: ``change(problem, q, k, v, mask, scale, operands)`` gives what is used instead."""

    def make(run: Run, problem: Any) -> Run:
        def faulty(*given: Any) -> Any:
            return run(*change(problem, *given)) if when(problem) else run(*given)

        return faulty

    return make


def outputs(change: Callable[..., Any], when: Callable[[Any], bool] = lambda p: True) -> Change:
    """A fault in what comes out: ``change(problem, out, lse or None, *given)`` gives the pair returned instead."""

    def make(run: Run, problem: Any) -> Run:
        def faulty(*given: Any) -> Any:
            found = run(*given)
            if not when(problem):
                return found
            out, lse, *rest = found if problem.return_lse else (found, None)
            out, lse = change(problem, out, lse, *given)
            return (out, lse, *rest) if problem.return_lse else out

        return faulty

    return make


def _problem(**changes: Any) -> Change:
    """A field of the problem is not honoured."""

    def make(run: Run, problem: Any) -> Run:
        other = dataclasses.replace(problem, **changes)
        keeps = "score_mod" not in changes

        def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
            if operands is not None and not keeps:
                operands = dataclasses.replace(operands, captured=())
            if operands is not None and "mask_mod" in changes:
                operands = dataclasses.replace(
                    operands,
                    mask_captured=(),
                    kv_num_blocks=None,
                    kv_indices=None,
                    full_kv_num_blocks=None,
                    full_kv_indices=None,
                )
            return honest_attention(other, q, k, v, mask, scale, operands)

        return faulty

    return make


def _dense(problem: Any) -> bool:
    return bool(problem.layout == "dense")


# ---------------------------------------------------------------------------- arithmetic


def _scaled(p: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, o: Any) -> tuple[Any, ...]:
    return q, k, v, mask, scale * 1.01, o


def _squared(p: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, o: Any) -> tuple[Any, ...]:
    return q, k, v, mask, scale * abs(scale), o


def _rounded(bits: int) -> Callable[..., tuple[Any, ...]]:
    def cut(t: Tensor) -> Tensor:
        if t.dtype is not torch.float32:
            return t
        keep = -1 << (23 - bits)
        return (t.detach().contiguous().view(torch.int32) & keep).view(torch.float32) + (t - t.detach())

    def change(p: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, o: Any) -> tuple[Any, ...]:
        return cut(q), cut(k), cut(v), mask, scale, o

    return change


def _noisy_head(p: Any, out: Tensor, lse: Any, *given: Any) -> Any:
    if out.dim() == 4 and out.shape[1] > 1:
        out = out.clone()
        out[:, 1] = out[:, 1] * 1.001
    return out, lse


def _bf16_output(p: Any, out: Tensor, lse: Any, *given: Any) -> Any:
    return out.to(torch.bfloat16).to(out.dtype), lse


def _unstable(run: Run, problem: Any) -> Run:
    def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
        plain = problem.layout == "dense" and not problem.features - {"lse", "backward"} and k.shape[2]
        if not plain:
            return run(q, k, v, mask, scale, operands)
        weights = torch.exp((q.float() @ k.float().mT) * scale)
        total = weights.sum(-1, keepdim=True)
        out = ((weights / total) @ v.float()).to(q.dtype)
        return (out, torch.log(total).squeeze(-1)) if problem.return_lse else out

    return faulty


def _lse_without_maximum(p: Any, out: Tensor, lse: Any, *given: Any) -> Any:
    return out, None if lse is None else lse - lse.detach().amax(-1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)


def _maxima(change: Callable[[Tensor, float], Tensor]) -> Change:
    """A fault in the row maxima: ``change(maxima, scale)``."""

    def make(run: Run, problem: Any) -> Run:
        def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
            *rest, maxima = run(q, k, v, mask, scale, operands)
            return (*rest, change(maxima, scale))

        return faulty if problem.return_max_scores else run

    return make


def _lse_in_bits(p: Any, out: Tensor, lse: Any, *given: Any) -> Any:
    return out, None if lse is None else lse * math.log2(math.e)


def _lse_narrow(p: Any, out: Tensor, lse: Any, *given: Any) -> Any:
    return out, None if lse is None else lse.to(torch.bfloat16)


# ---------------------------------------------------------------------------- indexing


def _causal(diagonal: Callable[[int, int], int]) -> Change:
    def make(run: Run, problem: Any) -> Run:
        if not (problem.is_causal and problem.layout == "dense" and problem.mask_dtype is None):
            return run
        other = dataclasses.replace(problem, is_causal=False, mask_dtype=torch.bool)

        def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
            rows, keys = q.shape[2], k.shape[2]
            seen = torch.ones(rows, keys, dtype=torch.bool).tril(diagonal(rows, keys))
            return honest_attention(other, q, k, v, seen, scale, operands)

        return faulty

    return make


def _interleaved(p: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, o: Any) -> tuple[Any, ...]:
    group = p.query_heads // max(p.key_heads, 1)
    order = [h % p.key_heads * group + h // p.key_heads for h in range(p.query_heads)]
    dimension = 1 if q.dim() == 4 else -2
    return q.index_select(dimension, torch.tensor(order)), k, v, mask, scale, o


def _short_tail(p: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, o: Any) -> tuple[Any, ...]:
    keys = k.shape[2]
    if keys % 16 == 1 and keys > 1 and mask is None and o is None:
        return q, k[:, :, :-1], v[:, :, :-1], mask, scale, o
    return q, k, v, mask, scale, o


def _last_rows(p: Any, out: Tensor, lse: Any, *given: Any) -> Any:
    rows = out.shape[2] % 16 if out.dim() == 4 and out.shape[2] > 16 else 0
    if rows:
        out = out.clone()
        out[:, :, -rows:] = 0.0
    return out, lse


def _first_mask_row(p: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, o: Any) -> tuple[Any, ...]:
    if mask is not None and mask.dim() >= 2:
        mask = mask[..., :1, :]
    return q, k, v, mask, scale, o


def _scaled_mask(p: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, o: Any) -> tuple[Any, ...]:
    if mask is not None and mask.is_floating_point():
        mask = mask * scale
    return q, k, v, mask, scale, o


def _flat(t: Tensor) -> Tensor:
    """What a kernel sees that takes strides for granted."""
    steps = torch.empty(t.shape, device="meta").stride()
    return torch.as_strided(t, t.shape, steps, t.storage_offset()) if _reaches(t, steps) else t


def _reaches(t: Tensor, steps: tuple[int, ...]) -> bool:
    last = t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, steps))
    return bool(t.numel()) and last < t.untyped_storage().nbytes() // t.element_size()


def _no_strides(p: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, o: Any) -> tuple[Any, ...]:
    return _flat(q), _flat(k), _flat(v), mask, scale, o


def _no_offset(p: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, o: Any) -> tuple[Any, ...]:
    def start(t: Tensor) -> Tensor:
        return torch.as_strided(t, t.shape, t.stride(), 0) if t.storage_offset() else t

    return start(q), start(k), start(v), mask, scale, o


def _operands(change: Callable[[Any, Any], dict[str, Any]], layout: str) -> Change:
    def make(run: Run, problem: Any) -> Run:
        def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
            changed = (
                dataclasses.replace(operands, **change(problem, operands))
                if problem.layout == layout
                else operands
            )
            return run(q, k, v, mask, scale, changed)

        return faulty

    return make


def _in_order(p: Any, operands: Any) -> dict[str, Any]:
    return {"page_table": operands.page_table.sort(1).values}


def _whole_pages(p: Any, operands: Any) -> dict[str, Any]:
    most = operands.page_table.shape[1] * p.page_size
    return {"seq_lens": (-(-operands.seq_lens // p.page_size) * p.page_size).clamp(max=most).to(torch.int32)}


def _leaking(p: Any, operands: Any) -> dict[str, Any]:
    ends = operands.cu_seqlens_k.clone()
    ends[1:-1] = torch.minimum(ends[1:-1] + 1, ends[-1])
    return {"cu_seqlens_k": ends}


def _stale_page(run: Run, problem: Any) -> Run:
    kept: dict[Any, Any] = {}

    def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
        if problem.layout == "paged":
            first = kept.setdefault(tuple(operands.page_table.shape), operands.page_table.clone())
            operands = dataclasses.replace(operands, page_table=first)
        return run(q, k, v, mask, scale, operands)

    return faulty


_m = functools.partial(Mutant, family="attention")

MUTANTS: Final = (
    _m("wrong_scale", "the scale is 1 % too large", NUMBERS, inputs(_scaled)),
    _m("scale_squared", "the scale is applied to query and key both", NUMBERS, inputs(_squared)),
    _m("tf32", "float32 inputs are cut to 10 bits, as TF32 does", NUMBERS, inputs(_rounded(10))),
    _m("bf16_inputs", "float32 inputs are cut to 7 bits", NUMBERS, inputs(_rounded(7))),
    _m("bf16_output", "the result went through bfloat16", NUMBERS, outputs(_bf16_output)),
    _m("noisy_head", "one head is off by a thousandth", NUMBERS, outputs(_noisy_head)),
    _m("unstable_softmax", "no maximum is subtracted before exp", NUMBERS, _unstable),
    _m("lse_without_maximum", "the LSE lacks the maximum", NUMBERS, outputs(_lse_without_maximum)),
    _m(
        "lse_in_bits",
        "the LSE is a logarithm to base 2",
        (*NUMBERS, "attention.merge"),
        outputs(_lse_in_bits),
    ),
    _m(
        "maxima_in_bits", "row maxima are in base 2", NUMBERS, _maxima(lambda m, scale: m * math.log2(math.e))
    ),
    _m("maxima_unscaled", "row maxima lack the scale", NUMBERS, _maxima(lambda m, scale: m / scale)),
    _m(
        "maxima_of_nothing",
        "a row that sees no key has a maximum of 0",
        NUMBERS,
        _maxima(lambda m, scale: m.masked_fill(torch.isneginf(m), 0.0)),
    ),
    _m("lse_narrow", "the LSE is bfloat16", NUMBERS, outputs(_lse_narrow)),
    _m("causal_off_by_one", "the causal limit hides the diagonal", NUMBERS, _causal(lambda rows, keys: -1)),
    _m(
        "causal_bottom_right",
        "the causal limit is aligned bottom right",
        NUMBERS,
        _causal(lambda rows, keys: keys - rows),
    ),
    _m(
        "interleaved_heads",
        "query head h reads key head h mod Hkv",
        NUMBERS,
        inputs(_interleaved, lambda p: p.key_heads not in (0, 1, p.query_heads)),
    ),
    _m("short_tail", "the last key is dropped where it begins a tile", NUMBERS, inputs(_short_tail, _dense)),
    _m("last_rows", "a last partial tile of rows stays zero", NUMBERS, outputs(_last_rows)),
    _m("first_mask_row", "the mask's first row serves all rows", NUMBERS, inputs(_first_mask_row)),
    _m("scaled_mask", "the additive mask is scaled too", NUMBERS, inputs(_scaled_mask)),
    _m("no_score_mod", "the score_mod is dropped", NUMBERS, _problem(score_mod=None)),
    _m("no_mask_mod", "the mask_mod is dropped", NUMBERS, _problem(mask_mod=None, block_size=None)),
    _m("no_strides", "tensors are read as if contiguous", ("attention.strides",), inputs(_no_strides)),
    _m("no_offset", "storage offsets are ignored", ("attention.strides",), inputs(_no_offset)),
    _m(
        "pages_in_order",
        "the page table is taken to be sorted",
        ("attention.page_order", "attention.numbers"),
        _operands(_in_order, "paged"),
    ),
    _m("stale_page", "the page table is that of the first call", ("attention.page_order",), _stale_page),
    _m(
        "whole_pages",
        "the last page is read to its end",
        ("attention.page_poison", "attention.numbers"),
        _operands(_whole_pages, "paged"),
    ),
    _m(
        "leaking_sequences",
        "each sequence sees one key of the next",
        ("attention.sequence_leak", "attention.numbers"),
        _operands(_leaking, "varlen"),
    ),
)
