"""Faults in the other families: the same broken promises, and what only they can get wrong."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torchhal_conformance.mutants import Change, Mutant, Run


def _each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``change`` applied to every tensor of a result, tuples and lists kept."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_each(change, item) for item in value)
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(lambda t: (found.append(t), t)[1], value)  # type: ignore[func-returns-value]
    return found


def _result(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda run, problem: lambda *given: _each(change, run(*given))


def _slightly_off(t: Tensor) -> Tensor:
    return t * 1.003 if t.is_floating_point() else t


def _random_bits(run: Run, problem: Any) -> Run:
    numbers = itertools.count()

    def faulty(*given: Any) -> Any:
        found = run(*given)
        off = next(numbers) % 3 == 2
        return _each(
            lambda t: (
                t + t.abs() * 4 * torch.finfo(t.dtype).eps
                if off and t.is_floating_point()
                else t ^ 1
                if off and t.dtype is torch.bool
                else t
            ),
            found,
        )

    return faulty


def _damage(run: Run, problem: Any) -> Run:
    def faulty(*given: Any) -> Any:
        found = run(*given)
        kept = {t.data_ptr() for t in _tensors(found)}
        for tensor in _tensors(given):
            if not tensor.requires_grad and tensor.numel() and tensor.data_ptr() not in kept:
                tensor.view(-1)[:1] = 1 if tensor.is_contiguous() else tensor.view(-1)[:1]
        return found

    return faulty


def memo(run: Run, problem: Any) -> Run:
    """Results are remembered by address."""
    kept: dict[Any, Any] = {}

    def faulty(*given: Any) -> Any:
        key = tuple((t.data_ptr(), t.shape, t.dtype) for t in _tensors(given))
        if key not in kept:
            kept[key] = (run(*given), given)
        return kept[key][0]

    return faulty


def scratch(run: Run, problem: Any) -> Run:
    """All threads share one buffer."""
    shared: dict[str, Any] = {}

    def faulty(*given: Any) -> Any:
        shared["given"] = given
        if threading.active_count() > 2:
            time.sleep(0.002)
        return run(*shared["given"])

    return faulty


def leaky(run: Run, problem: Any) -> Run:
    """Each call keeps 64 KiB."""
    kept: list[Any] = []

    def faulty(*given: Any) -> Any:
        kept.append(bytearray(b"x" * 65536))
        return run(*given)

    return faulty


def draws(run: Run, problem: Any) -> Run:
    """A random number is drawn."""

    def faulty(*given: Any) -> Any:
        torch.rand(1)
        return run(*given)

    return faulty


def _unwritten(run: Run, problem: Any) -> Run:
    seen: set[Any] = set()

    def faulty(*given: Any) -> Any:
        found = run(*given)
        key = tuple((t.data_ptr(), t.shape) for t in _tensors(given))
        again = key in seen
        seen.add(key)
        return _each(lambda t: torch.empty_like(t) if again and not t.requires_grad else t, found)

    return faulty


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * 0.5


def _halved(tensor: Tensor) -> Tensor:
    return _Halved.apply(tensor)  # type: ignore[no-untyped-call,no-any-return]


def _ulps(count: int) -> Callable[[Tensor], Tensor]:
    """Too large by a few units in the last place: the smallest of the faults that a bound has to keep out."""
    return lambda t: t * (1.0 + count * torch.finfo(t.dtype).eps) if t.is_floating_point() else t


class _LooseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _ulps(16)(gradients[0])


def _loose_gradient(run: Run, problem: Any) -> Run:
    def loosened(t: Tensor) -> Tensor:
        return _LooseBackward.apply(t) if t.requires_grad else t  # type: ignore[no-untyped-call]

    return lambda *given: _each(loosened, run(*given))


def _half_gradient(run: Run, problem: Any) -> Run:
    def faulty(*given: Any) -> Any:
        return _each(lambda t: _halved(t) if t.requires_grad else t, run(*given))

    return faulty


def _drop(name: str) -> Change:
    def make(run: Run, problem: Any) -> Run:
        from torchhal.reference.matmul import plan

        if getattr(problem, name) is None:
            return run
        other: Any = plan(dataclasses.replace(problem, **{name: None}))

        def faulty(a: Any, b: Any, bias: Any, operands: Any) -> Any:
            captured = {
                "a_prologue": "a_captured",
                "b_prologue": "b_captured",
                "epilogue": "epilogue_captured",
            }[name]
            return other.run(a, b, bias, dataclasses.replace(operands, **{captured: ()}))

        return faulty

    return make


def _no_bias(run: Run, problem: Any) -> Run:
    return lambda a, b, bias, operands: run(a, b, None if bias is None else torch.zeros_like(bias), operands)


def _last_element(run: Run, problem: Any) -> Run:
    def faulty(operands: Any, captured: Any, out: Any) -> Any:
        found = run(operands, captured, out)
        return tuple(
            [*column[:-1], torch.zeros_like(column[-1])] if len(column) > 8 else column for column in found
        )

    return faulty


def _reduced(reduction: str, change: Callable[[list[Tensor]], list[Tensor]]) -> Change:
    """A fault in one reduction alone."""

    def make(run: Run, problem: Any) -> Run:
        if problem.reduction != reduction:
            return run
        return lambda *given: tuple(change(list(results)) for results in run(*given))

    return make


def _promises(family: str) -> tuple[Mutant, ...]:
    def one(name: str, fault: str, check: str, change: Change) -> Mutant:
        return Mutant(f"{family}_{name}", fault, (f"{family}.{check}",), change, family)

    return (
        one("off", "results are off by three thousandths", "numbers", _result(_slightly_off)),
        one("random_bits", "every third call differs in the last bits", "determinism", _random_bits),
        one("damage", "the first element of each input is overwritten", "inputs_alone", _damage),
        one("memo", "results are remembered by address", "fresh_data", memo),
        one("shared_scratch", "all threads share one buffer", "threads", scratch),
        one("leaky", "each call keeps 64 KiB", "memory_growth", leaky),
        one("draws_random", "a random number is drawn", "state", draws),
        one("unwritten_later", "only the first call writes its result", "written", _unwritten),
        one("half_gradient", "gradients are half of what they should be", "gradients", _half_gradient),
        one(
            "ulps_off", "results are too large by eight units in the last place", "numbers", _result(_ulps(8))
        ),
        one(
            "gradient_ulps_off",
            "gradients are too large by sixteen units in the last place",
            "gradients",
            _loose_gradient,
        ),
    )


MUTANTS: Final[tuple[Mutant, ...]] = (
    *_promises("matmul"),
    *_promises("foreach"),
    Mutant(
        "matmul_no_a_prologue",
        "the prologue of a is dropped",
        ("matmul.numbers",),
        _drop("a_prologue"),
        "matmul",
    ),
    Mutant(
        "matmul_no_b_prologue",
        "the prologue of b is dropped",
        ("matmul.numbers",),
        _drop("b_prologue"),
        "matmul",
    ),
    Mutant("matmul_no_bias", "the bias is dropped", ("matmul.numbers",), _no_bias, "matmul"),
    Mutant(
        "foreach_running_sum",
        "a tensor's sum goes on from that of the one before it",
        ("foreach.numbers",),
        _reduced("sum", lambda sums: list(itertools.accumulate(sums))),
        "foreach",
    ),
    Mutant(
        "foreach_max_skips_nan",
        "the largest element passes over NaN",
        ("foreach.bitwise",),
        _reduced("max", lambda found: [t.nan_to_num(0.0, torch.inf, -torch.inf) for t in found]),
        "foreach",
    ),
    Mutant(
        "foreach_any_of_first",
        "whether any element is not 0 is asked of the first tensor alone",
        ("foreach.bitwise",),
        _reduced("any", lambda found: [found[0]] * len(found)),
        "foreach",
    ),
    Mutant(
        "foreach_last_of_many",
        "the last tensor of a long list is skipped",
        ("foreach.numbers",),
        _last_element,
        "foreach",
    ),
)
