"""Faults of honour or refuse: an argument that is dropped, a claim that is declined, a call that is handed on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

import torchhal
from torchhal import Decline
from torchhal.hookspecs import hook_name
from torchhal_conformance.mutants import Change, Mutant, Run
from torchhal_conformance.mutants.attention import _problem, inputs
from torchhal_conformance.mutants.others import _drop

# ---------------------------------------------------------------------------- dropped arguments


def _default_scale(p: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, o: Any) -> tuple[Any, ...]:
    return q, k, v, mask, q.shape[-1] ** -0.5, o


def _no_mask(kind: Callable[[Tensor], bool]) -> Change:
    def make(run: Run, problem: Any) -> Run:
        bare = _problem(mask_dtype=None)(run, problem)

        def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
            if mask is None or not kind(mask):
                return run(q, k, v, mask, scale, operands)
            return bare(q, k, v, None, scale, operands)

        return faulty

    return make


def _no_dropout(run: Run, problem: Any) -> Run:
    return _problem(dropout=False)(run, problem) if problem.dropout else run


def _other_type(run: Run, problem: Any) -> Run:
    def faulty(*given: Any) -> Any:
        return tuple(t.to(problem.a_dtype) for t in run(*given))

    return faulty


def _elsewhere(run: Run, problem: Any) -> Run:
    """Results come back, and the places they were to be written to keep what they held."""

    def faulty(operands: Any, captured: Any, out: Any) -> Any:
        return run(operands, captured, None) if out is not None else run(operands, captured, out)

    return faulty


def _first_number(run: Run, problem: Any) -> Run:
    """A list of numbers gives its first one to every position."""

    def faulty(operands: Any, captured: Any, out: Any) -> Any:
        def first(operand: Any) -> Any:
            numbers = isinstance(operand, (list, tuple)) and operand and not isinstance(operand[0], Tensor)
            return type(operand)([operand[0]] * len(operand)) if numbers else operand

        return run([first(operand) for operand in operands], captured, out)

    return faulty


# ---------------------------------------------------------------------------- lying claims


class Denying(Mutant):
    """Claims everything, and declines what it is asked for where ``denies`` says so."""

    def _hook(self, family: str) -> Any:
        honest = super()._hook(family)

        def answer(problem: Any) -> Any:
            if family == self.family and problem.features & DENIED[self.name]:
                return Decline("not_now", "claimed, and not there")
            return honest(problem)

        answer.__name__ = hook_name(family)
        return torchhal.hookimpl(answer)


DENIED: Final = {
    "causal_denied": frozenset({"causal"}),
    "epilogue_denied": frozenset({"epilogue"}),
    "scalars_denied": frozenset({"scalars"}),
}
"""Features that each of them claims and declines."""


def _as_it_is(run: Run, problem: Any) -> Run:
    return run


# ---------------------------------------------------------------------------- handed on


def _attention_handed_on(run: Run, problem: Any) -> Run:
    if problem.layout != "dense" or problem.score_mod or problem.mask_mod or problem.dropout:
        return run

    def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
        return torchhal.attention(
            q, k, v, attn_mask=mask, scale=scale, is_causal=problem.is_causal, enable_gqa=True,
            return_lse=problem.return_lse, backend="reference",
        )  # fmt: skip

    return faulty


def _matmul_handed_on(run: Run, problem: Any) -> Run:
    if problem.features or problem.packing or len(problem.out_dtypes) > 1:
        return run

    def faulty(a: Any, b: Any, bias: Any, operands: Any) -> Any:
        return (torchhal.matmul(a, b, out_dtype=problem.out_dtypes[0], backend="reference"),)

    return faulty


def _foreach_handed_on(run: Run, problem: Any) -> Run:
    def faulty(operands: Any, captured: Any, out: Any) -> Any:
        lists = [
            each
            for each in operands
            if isinstance(each, (list, tuple)) and each and isinstance(each[0], Tensor)
        ]
        if lists and lists[0][0].is_floating_point():
            torchhal.foreach_map(torch.neg, list(lists[0]), backend="reference")
        return run(operands, captured, out)

    return faulty


# ---------------------------------------------------------------------------- after the compiler


def _compiled_off(run: Run, problem: Any) -> Run:
    """Right where it is called, and not where a compiler traced it."""

    def faulty(*given: Any) -> Any:
        found = run(*given)
        if not torch.compiler.is_compiling():
            return found
        if isinstance(found, tuple):
            return (found[0] * 1.01, *found[1:])
        return found * 1.01

    return faulty


_a = functools.partial(Mutant, family="attention")
_NUMBERS: Final = ("attention.numbers",)
MUTANTS: Final = (
    _a("no_scale", "the scale is dropped for the default", _NUMBERS, inputs(_default_scale)),
    _a("no_causal", "is_causal is dropped", _NUMBERS, _problem(is_causal=False)),
    _a("no_boolean_mask", "a boolean mask is dropped", _NUMBERS, _no_mask(lambda m: m.dtype is torch.bool)),
    _a("no_additive_mask", "an additive mask is dropped", _NUMBERS, _no_mask(lambda m: m.is_floating_point())),
    _a("no_dropout", "dropout is dropped", _NUMBERS, _no_dropout),
    Mutant("matmul_no_epilogue", "the epilogue is dropped", ("matmul.numbers",), _drop("epilogue"), "matmul"),
    Mutant("matmul_no_out_dtype", "out_dtype is dropped", ("matmul.numbers",), _other_type, "matmul"),
    Mutant("foreach_no_out", "out is dropped", ("foreach.bitwise",), _elsewhere, "foreach"),
    Mutant("foreach_first_number", "a list of numbers is read at its start", ("foreach.bitwise",), _first_number, "foreach"),
    Denying("causal_denied", "causal is claimed and declined", _NUMBERS, _as_it_is),
    Denying("epilogue_denied", "epilogues are claimed and declined", ("matmul.numbers",), _as_it_is, "matmul"),
    Denying("scalars_denied", "numbers are claimed and declined", ("foreach.numbers",), _as_it_is, "foreach"),
    _a("handed_on", "the call is handed on to another backend", ("attention.own_work",), _attention_handed_on),
    Mutant("matmul_handed_on", "the call is handed on to another backend", ("matmul.own_work",), _matmul_handed_on, "matmul"),
    Mutant(
        "foreach_handed_on", "a part of the call is handed on to another backend", ("foreach.own_work",), _foreach_handed_on,
        "foreach",
    ),
    _a(
        "compiled_off", "results are off by one per cent after torch.compile alone", ("attention.compiled",), _compiled_off,
        promises={"traceable": True},
    ),
)  # fmt: skip
