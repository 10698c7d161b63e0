"""Does a call trace as one node, give the same numbers compiled, and keep its trace when only a length changes?"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch._aot_autograd.utils import make_boxed_func

from torchhal_conformance import calls, tolerance
from torchhal_conformance.families import attention, samples
from torchhal_conformance.model import Check, CheckFailed, Explanation, Inputs, Measured, Sample


def compiled(backend: str, sample: Sample, seed: int) -> Measured:
    """``torch.compile(fullgraph=True)`` against the truth, and one trace."""
    inputs = calls.make(sample, backend, seed)
    function, counter = _compile(sample, backend)
    found = _run(function, inputs)
    exact, plain = calls.truth(sample, inputs)
    names = [f"compiled result {i}" for i in range(len(exact))]
    ratio = tolerance.judge(found, exact, plain, tolerance.FORWARD, names)
    _run(function, calls.make(sample, backend, seed + 1))
    if counter.frame_count != 1:
        raise CheckFailed("one trace for two calls that differ in data alone", counter.frame_count)
    return Measured(ratio)


def lengths(backend: str, sample: Sample, seed: int) -> Measured:
    """Four lengths, two traces: the first, and one for all lengths."""
    call = attention.Call(causal="causal" in sample.tags, batch=2, rows=9, keys=13)
    function, counter = None, None
    for step in (0, 2, 5, 11):
        longer = attention.sample(dataclasses.replace(call, rows=call.rows + step, keys=call.keys + step))
        if function is None:
            function, counter = _compile(longer, backend)
        _run(function, calls.make(longer, backend, seed))
    assert counter is not None
    if counter.frame_count > 2:
        raise CheckFailed("at most two traces for four lengths", counter.frame_count)
    return Measured()


def operators(backend: str, sample: Sample, seed: int) -> Measured:
    """``torch.library.opcheck`` on each operator that is not torch's own in the traced graph."""
    inputs = calls.make(sample, backend, seed)
    found = _Operators()
    torch.compiler.reset()
    call = functools.partial(sample.call, backend)
    _run(torch.compile(call, fullgraph=True, backend=found.compile), inputs)
    if not found.calls:
        raise CheckFailed("an operator of torchhal or of the backend in the traced graph", "none")
    for operator, args, kwargs in found.calls:
        try:
            torch.library.opcheck(operator, args, kwargs)
        except Exception as error:
            raise CheckFailed(f"{operator} to pass torch.library.opcheck", error) from error
    return Measured(note=", ".join(str(operator) for operator, *_ in found.calls))


class _Operators:
    """Collects the calls of custom operators with the arguments they had."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def compile(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def inner(module: torch.fx.GraphModule, _: Any) -> Any:
            return make_boxed_func(lambda *args: self._interpret(module, args))

        return aot_autograd(fw_compiler=inner)(graph, inputs)

    def _interpret(self, module: torch.fx.GraphModule, args: tuple[Any, ...]) -> Any:
        calls = self.calls

        class Watching(torch.fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if isinstance(target, torch._ops.OpOverload) and target.namespace not in TORCHS:
                    calls.append((target, args, kwargs))
                return super().call_function(target, args, kwargs)

        return Watching(module).run(*args)


TORCHS: Final = frozenset(("aten", "prims", "prim", "inductor"))


def _compile(sample: Sample, backend: str) -> tuple[Any, CompileCounterWithBackend]:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(functools.partial(sample.call, backend), fullgraph=True, backend=counter), counter


def _run(function: Any, inputs: Inputs) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return function(inputs)


def _traceable() -> Iterator[Sample]:
    """One sample for each combination of claims in float32; a BlockMask is made outside compiled code, so none has one."""
    seen = set()
    for sample in samples("attention"):
        if "dropout" in sample.tags:  # whose seed is drawn where Dynamo does not look
            continue
        kind = (sample.needs.features, sample.needs.choice)
        plain = (
            torch.float32 in sample.needs.dtypes and "small" in sample.tags and sample.profile == "inference"
        )
        if plain and kind not in seen and not ("mask_mod" in sample.tags and "dense" in sample.tags):
            seen.add(kind)
            yield sample


EXPLANATION: Final = Explanation(
    tests="Compiles the call with fullgraph=True; numbers must be as near to the truth as in eager mode, and one trace serve all data.",
    why="An operator whose fake formula promises other strides than it delivers gives wrong numbers after the compiler only.",
    debug="Run torch.library.opcheck on the operator that the plan leaves in the graph.",
)


def checks() -> Iterator[Check]:
    """Attention, the family whose plans may leave operators of their own."""
    yield Check("attention.compiled", EXPLANATION, _traceable, compiled)
    yield Check(
        "attention.opcheck",
        Explanation(
            "Finds the operators that a compiled call leaves in the graph and runs torch.library.opcheck on each.",
            "A fake formula that disagrees with the kernel in a stride or a type is found by users, in Inductor's code, years "
            "later.",
            "Run torch.library.opcheck yourself on the operator and arguments named in the message.",
        ),
        _traceable,
        operators,
    )
    yield Check(
        "attention.compiled_lengths",
        Explanation(
            "Calls compiled code with four lengths: two traces at most.",
            "A plan that reads a length as a number makes a server compile for every prompt.",
            "TORCH_LOGS=recompiles names the guard that failed.",
        ),
        lambda: (s for s in _traceable() if s.tags <= {"dense", "small", "causal", "typical"}),
        lengths,
    )
