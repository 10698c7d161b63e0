"""Faults against what every plan promises."""

from __future__ import annotations

import functools
import itertools
from typing import Any, Final

import torch
from torch import Tensor

from torchhal_conformance.mutants import Mutant, Run
from torchhal_conformance.mutants.others import draws, leaky, memo, scratch


def _in_place(run: Run, problem: Any) -> Run:
    def faulty(q: Tensor, k: Any, v: Any, mask: Any, scale: float, o: Any) -> Any:
        if q.requires_grad or scale <= 0:
            return run(q, k, v, mask, scale, o)
        return run(q.mul_(scale), k, v, mask, 1.0, o)

    return faulty


def _beside(run: Run, problem: Any) -> Run:
    def faulty(q: Any, k: Tensor, *rest: Any) -> Any:
        found = run(q, k, *rest)
        size = k.untyped_storage().nbytes() // k.element_size()
        end = k.storage_offset() + k.numel()
        if k.is_contiguous() and end < size:
            torch.as_strided(k.detach(), (1,), (1,), end).fill_(0.0)
        return found

    return faulty


def _random(run: Run, problem: Any) -> Run:
    numbers = itertools.count()

    def faulty(*given: Any) -> Any:
        found = run(*given)
        out = found[0] if problem.return_lse else found
        if next(numbers) % 3 == 2:
            out = out * (1.0 + 2.0 * torch.finfo(out.dtype).eps)
        return (out, *found[1:]) if problem.return_lse else out

    return faulty


def _threads(run: Run, problem: Any) -> Run:
    def faulty(*given: Any) -> Any:
        torch.set_num_threads(torch.get_num_threads() % 8 + 1)
        return run(*given)

    return faulty


def _unwritten(run: Run, problem: Any) -> Run:
    def faulty(*given: Any) -> Any:
        found = run(*given)
        out = found[0] if problem.return_lse else found
        if not out.numel() or out.requires_grad:
            return found
        memory = torch.empty_like(out, memory_format=torch.contiguous_format)
        memory.view(-1)[1:] = out.reshape(-1)[1:]
        return (memory, *found[1:]) if problem.return_lse else memory

    return faulty


def _unwritten_memo(run: Run, problem: Any) -> Run:
    """Writes a result once and afterwards hands out memory as the allocator gives it."""
    seen: set[Any] = set()

    def faulty(q: Tensor, *rest: Any) -> Any:
        found = run(q, *rest)
        key = (q.data_ptr(), q.shape)
        out = found[0] if problem.return_lse else found
        if key in seen and out.numel() and not out.requires_grad:
            count = len(found) if problem.return_lse else 1
            del found
            out = torch.empty(out.shape, dtype=out.dtype)
            rows = [torch.empty(out.shape[:-1]) for _ in range(count - 1)]
            return (out, *rows) if rows else out
        seen.add(key)
        return found

    return faulty


def _undeclared(run: Run, problem: Any) -> Run:
    return run


def _number(run: Run, problem: Any) -> Run:
    def faulty(q: Tensor, *rest: Any) -> Any:
        if q.numel() and float(q.flatten()[0]) > 1e30:
            raise ValueError("never")
        return run(q, *rest)

    return faulty


def _length_as_number(run: Run, problem: Any) -> Run:
    def faulty(q: Tensor, *rest: Any) -> Any:
        if int(q.shape[2]) == 12345:
            raise ValueError("never")
        return run(q, *rest)

    return faulty


def _no_zero(run: Run, problem: Any) -> Run:
    def faulty(q: Tensor, k: Tensor, *rest: Any) -> Any:
        if not q.numel() or not k.numel():
            raise ZeroDivisionError("grid of size 0")
        return run(q, k, *rest)

    return faulty


def _paged_lie(run: Run, problem: Any) -> Run:
    def faulty(*given: Any) -> Any:
        if problem.layout == "paged":
            raise RuntimeError("this build holds no kernel for pages")
        return run(*given)

    return faulty


_m = functools.partial(Mutant, family="attention")

MUTANTS: Final = (
    _m("in_place", "the query is scaled in place", ("attention.inputs_alone",), _in_place),
    _m("beside", "one element behind the key is overwritten", ("attention.inputs_alone",), _beside),
    _m("random_bits", "every third call differs in the last bit", ("attention.determinism",), _random),
    _m("leaky", "each call keeps 64 KiB", ("attention.memory_growth",), leaky),
    _m("threads_left", "torch's number of threads is changed", ("attention.state",), _threads),
    _m("draws_random", "a random number is drawn", ("attention.state",), draws),
    _m("memo", "results are remembered by address", ("attention.fresh_data",), memo),
    _m("shared_scratch", "all threads share one buffer", ("attention.threads",), scratch),
    _m(
        "unwritten",
        "the first element is left as the allocator gave it",
        ("attention.numbers", "attention.written"),
        _unwritten,
    ),
    _m("unwritten_later", "only the first call writes its result", ("attention.written",), _unwritten_memo),
    _m(
        "undeclared_square",
        "the scores are materialised and the plan says O(L)",
        ("attention.linear_memory",),
        _undeclared,
        promises={"workspace": "O(L)"},
    ),
    _m(
        "graph_break",
        "the plan claims to be traceable and reads a number out of a tensor",
        ("attention.compiled",),
        _number,
        promises={"traceable": True},
    ),
    _m(
        "length_as_number",
        "the plan claims to be traceable and makes a constant of the length",
        ("attention.compiled_lengths",),
        _length_as_number,
        promises={"traceable": True},
    ),
    _m("no_zero_lengths", "empty tensors raise", ("attention.numbers",), _no_zero),
    _m("paged_lie", "the paged layout is claimed and not there", ("attention.numbers",), _paged_lie),
)
