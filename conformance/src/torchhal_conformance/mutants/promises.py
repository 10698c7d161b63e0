"""Faults against promises of a plan, on devices with streams and graphs, and after errors; for every family alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torchhal import Capabilities, hookspecs
from torchhal.errors import InvalidProblem
from torchhal.reference import plugin as reference
from torchhal_conformance.mutants import Change, Mutant, Run
from torchhal_conformance.mutants.others import _each, _tensors

FAMILIES: Final = ("attention", "matmul", "foreach")

# ---------------------------------------------------------------------------- streams and graphs

ON_DEVICE: Final = Capabilities(
    # The reference reads lengths, pages and hidden values on the host where it does not compute on whole tensors.
    attention=dataclasses.replace(
        reference.ATTENTION, layouts=frozenset({"dense"}), boolean_mask=False, additive_mask=False, mask_mod=False
    ),
    matmul=reference.MATMUL,
    foreach=reference.FOREACH,
)  # fmt: skip


def default_stream(run: Run, problem: Any) -> Run:
    """Launches where the plan was made, on the default stream, wherever the call is made."""
    home = torch.accelerator.current_stream()

    def faulty(*given: Any) -> Any:
        with home:
            return run(*given)

    return faulty


def baked_constants(run: Run, problem: Any) -> Run:
    """Reads a number of the data on the host, anew whenever they change: but nothing changes for a replay."""
    kept: dict[Any, float] = {}

    def faulty(*given: Any) -> Any:
        found = run(*given)
        first = next((t for t in _tensors(given) if t.is_floating_point() and t.numel()), None)
        if first is None:
            return found
        key = (first.data_ptr(), first.dtype, first.shape, first._version)
        if key not in kept:
            kept[key] = float(first.detach().flatten()[0])
        stale = kept[key] - first.detach().flatten()[0]  # 0, unless the data changed behind the host's back
        return _each(lambda t: t + stale.to(t.dtype) if t.is_floating_point() else t, found)

    return faulty


def _on_device(family: str) -> tuple[Mutant, ...]:
    def one(name: str, fault: str, check: str, change: Any) -> Mutant:
        needs = frozenset({check})
        return Mutant(f"{family}_{name}", fault, (f"{family}.{check}",), change, family, {}, ON_DEVICE, needs)

    return (
        one("default_stream", "work is launched on the default stream, always", "streams", default_stream),
        one("baked_constants", "a number is read on the host before a capture", "graphs", baked_constants),
    )


# ---------------------------------------------------------------------------- batch invariance


def _order_by_batch(run: Run, problem: Any) -> Run:
    """More than one sequence are summed from the other end."""

    def faulty(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, operands: Any) -> Any:
        plain = problem.layout == "dense" and mask is None and operands is None and not problem.is_causal
        if plain and q.shape[0] > 1:
            return run(q, k.flip(2), v.flip(2), mask, scale, operands)
        return run(q, k, v, mask, scale, operands)

    return faulty


def _order_by_rows(run: Run, problem: Any) -> Run:
    """More than one row are summed from the other end."""

    def faulty(a: Tensor, b: Any, bias: Any, operands: Any) -> Any:
        if (
            isinstance(b, Tensor)
            and problem.a_prologue is None
            and problem.b_prologue is None
            and a.shape[-2] > 1
        ):
            return run(a.flip(-1), b.flip(-2), bias, operands)
        return run(a, b, bias, operands)

    return faulty


BATCH: Final = (
    Mutant(
        "order_by_batch", "the order of the sums depends on the batch size, and the plan promises that nothing does",
        ("attention.batch_invariance",), _order_by_batch, promises={"batch_invariant": True},
    ),
    Mutant(
        "matmul_order_by_rows", "the order of the sums depends on the number of rows, and the plan promises that nothing does",
        ("matmul.batch_invariance",), _order_by_rows, "matmul", {"batch_invariant": True},
    ),
)  # fmt: skip

# ---------------------------------------------------------------------------- gradients


def _straight_through(run: Run, problem: Any) -> Run:
    """The forward is made a little larger, and the backward does not follow."""

    def change(t: Tensor) -> Tensor:
        return t + t.detach() * 0.01 if t.is_floating_point() else t

    return lambda *given: _each(change, run(*given))


# ---------------------------------------------------------------------------- under the compiler


def _number(run: Run, problem: Any) -> Run:
    def faulty(*given: Any) -> Any:
        if float(_tensors(given)[0].flatten()[0]) > 1e30:
            raise ValueError("never")
        return run(*given)

    return faulty


def _length_as_number(run: Run, problem: Any) -> Run:
    def faulty(*given: Any) -> Any:
        if int(_tensors(given)[0].shape[0]) == 12345:
            raise ValueError("never")
        return run(*given)

    return faulty


_library: Final = torch.library.Library("torchhal_conformance_promises", "DEF")  # type: ignore[no-untyped-call]
_library.define("double(Tensor value) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("double", lambda value: (value * 2.0).contiguous(), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _fake_double(value: Tensor) -> Tensor:
    return torch.empty_strided(
        value.shape, [s + 1 for s in value.stride()], dtype=value.dtype, device=value.device
    )


torch.library.register_fake("torchhal_conformance_promises::double", _fake_double, lib=_library)


def _other_strides(run: Run, problem: Any) -> Run:
    """An operator of its own halves the results and doubles them again, and its fake formula has other strides."""
    double: Callable[[Tensor], Tensor] = torch.ops.torchhal_conformance_promises.double.default

    def faulty(*given: Any) -> Any:
        return _each(lambda t: double(t * 0.5) if t.is_floating_point() else t, run(*given))

    return faulty


def _compiled(family: str) -> tuple[Mutant, ...]:
    def one(name: str, fault: str, check: str, change: Any) -> Mutant:
        traceable = {"traceable": True}
        return Mutant(f"{family}_{name}", fault, (f"{family}.{check}",), change, family, traceable)

    return (
        one("graph_break", "a number is read out of a tensor where the plan is traced", "compiled", _number),
        one(
            "length_as_number",
            "a length is a constant where the plan is traced",
            "compiled_lengths",
            _length_as_number,
        ),
        one(
            "other_strides",
            "the fake formula promises strides that the kernel has not",
            "opcheck",
            _other_strides,
        ),
    )


# ---------------------------------------------------------------------------- errors


def _on_error(answer: Callable[[InvalidProblem, Run, tuple[Any, ...]], Any]) -> Change:
    """What a plan does instead of raising what it should for data that it can not accept."""

    def make(run: Run, problem: Any) -> Run:
        def faulty(*given: Any) -> Any:
            try:
                return run(*given)
            except InvalidProblem as error:
                return answer(error, run, given)

        return faulty

    return make


def _swallow(error: InvalidProblem, run: Run, given: tuple[Any, ...]) -> Any:
    return torch.zeros_like(given[0])


def _another_class(error: InvalidProblem, run: Run, given: tuple[Any, ...]) -> Any:
    raise IndexError(str(error))


def _mute(error: InvalidProblem, run: Run, given: tuple[Any, ...]) -> Any:
    raise InvalidProblem("bad argument")


def _write_first(error: InvalidProblem, run: Run, given: tuple[Any, ...]) -> Any:
    given[0].zero_()
    raise error


def _broken_afterwards(run: Run, problem: Any) -> Run:
    failed: list[bool] = []

    def faulty(*given: Any) -> Any:
        try:
            found = run(*given)
        except InvalidProblem:
            failed.append(True)
            raise
        return _each(torch.zeros_like, found) if failed else found

    return faulty


def _yes(claims: Any, name: str) -> bool:
    if not name.startswith("feature"):
        raise AttributeError(name)
    return True


def _yes_to_anything(family: str) -> Mutant:
    """Claims that answer whatever they are asked, as a dictionary with a default would."""
    honest = getattr(reference.CAPABILITIES, family)
    kind = type(type(honest).__name__, (type(honest),), {"__getattr__": _yes})
    claims = dataclasses.replace(reference.CAPABILITIES, **{family: kind(**vars(honest))})
    fault = "features of later specifications are answered with a plan that does not know them"
    return Mutant(
        f"{family}_yes_to_anything",
        fault,
        (f"{family}.errors",),
        lambda run, problem: run,
        family,
        {},
        claims,
    )


ERRORS: Final = ("attention.errors",)

MUTANTS: Final[tuple[Mutant, ...]] = (
    *(mutant for family in FAMILIES for mutant in _on_device(family)),
    *BATCH,
    *_compiled("matmul"),
    *_compiled("foreach"),
    Mutant("swallows", "zeros for lengths and pages that mean nothing", ERRORS, _on_error(_swallow)),
    Mutant("another_class", "an IndexError instead of InvalidProblem", ERRORS, _on_error(_another_class)),
    Mutant("mute", "errors do not say what was expected and what arrived", ERRORS, _on_error(_mute)),
    Mutant(
        "writes_first", "the query is overwritten before the error is raised", ERRORS, _on_error(_write_first)
    ),
    Mutant("broken_afterwards", "all calls after an error give zeros", ERRORS, _broken_afterwards),
    *(_yes_to_anything(family) for family in hookspecs.FAMILIES),
    *(
        Mutant(
            f"{family}_straight_through",
            "the backward belongs to another forward",
            (f"{family}.gradcheck",),
            _straight_through,
            family,
        )
        for family in FAMILIES
    ),
)
