"""Does a call trace as one node, give the same numbers compiled, and keep its trace when only a length changes?"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from torchhal_conformance import calls, tolerance
from torchhal_conformance.families import attention, samples
from torchhal_conformance.model import Check, CheckFailed, Explanation, Inputs, Measured, Sample


def compiled(backend: str, sample: Sample, seed: int) -> Measured:
    """``torch.compile(fullgraph=True)`` against the truth, for two calls that differ in data, and one trace."""
    function, counter = _compile(sample, backend)
    ratios = []
    for shift in range(2):
        inputs = calls.make(sample, backend, seed + shift)
        ratios.append(_judge(sample, inputs, _run(function, inputs)))
    # A float is a constant of a trace, so another one asks for another: that its result is right is what counts there.
    if counter.frame_count != 1 and "scalars" not in sample.needs.features:
        raise CheckFailed("one trace for two calls that differ in data alone", counter.frame_count)
    return Measured(max((ratio for ratio in ratios if ratio is not None), default=None))


def _judge(sample: Sample, inputs: Inputs, found: Any) -> float | None:
    """The ratio of errors; None where integers have the bits of plain torch."""
    exact, plain = calls.truth(sample, inputs)
    if "integer" not in sample.tags:
        names = [f"compiled result {i}" for i in range(len(exact))]
        return tolerance.judge(found, exact, plain, tolerance.FORWARD, names)
    if not all(map(calls.same_bits, found, plain)):  # the bits are the truth
        raise CheckFailed("the bits of plain torch after the compiler", "others")
    return None


def attention_lengths(backend: str, sample: Sample, seed: int) -> Measured:
    """Other numbers of rows and keys."""
    call = attention.Call(causal="causal" in sample.tags, batch=2, rows=9, keys=13)
    longer = (dataclasses.replace(call, rows=call.rows + step, keys=call.keys + step) for step in STEPS)
    return _lengths(backend, sample, [calls.make(attention.sample(c), backend, seed) for c in longer])


def matmul_lengths(backend: str, sample: Sample, seed: int) -> Measured:
    """Other numbers of rows of ``a``, which are a batch of tokens in most programs."""
    inputs = calls.make(sample, backend, seed)
    rows = [torch.cat([inputs["a"]] * (1 + step), -2) for step in STEPS]
    return _lengths(backend, sample, [{**inputs, "a": a} for a in rows])


def foreach_lengths(backend: str, sample: Sample, seed: int) -> Measured:
    """Longer tensors in the same lists."""
    inputs = calls.make(sample, backend, seed)
    return _lengths(
        backend, sample, [{name: _longer(value, step) for name, value in inputs.items()} for step in STEPS]
    )


STEPS: Final = (0, 2, 5, 11)


def _longer(value: Any, step: int) -> Any:
    return torch.cat([value] * (1 + step)) if isinstance(value, torch.Tensor) and value.dim() else value


def _lengths(backend: str, sample: Sample, given: list[Inputs]) -> Measured:
    """Four lengths, two traces: the first, and one for all lengths."""
    function, counter = _compile(sample, backend)
    for inputs in given:
        _run(function, inputs)
    if counter.frame_count > 2:
        raise CheckFailed("at most two traces for four lengths", counter.frame_count)
    return Measured()


def operators(backend: str, sample: Sample, seed: int) -> Measured:
    """``torch.library.opcheck`` on each operator that is not torch's own in the traced graph."""
    inputs = calls.make(sample, backend, seed)
    if any(t.isnan().any() for t in calls.truth(sample, inputs)[1]):
        return Measured(note="results hold NaN, which opcheck takes for a difference")
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
        # Dynamo takes as long to import as torch, and most processes compile nothing.
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch._aot_autograd.utils import make_boxed_func

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


def _compile(sample: Sample, backend: str) -> tuple[Any, Any]:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(functools.partial(sample.call, backend), fullgraph=True, backend=counter), counter


def _run(function: Any, inputs: Inputs) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return function(inputs)


def _traceable(family: str) -> Iterator[Sample]:
    """One sample for each combination of claims in float32; a BlockMask is made outside compiled code, so none has one."""
    seen = set()
    for sample in samples(family):
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


OPCHECK: Final = Explanation(
    "Finds the operators that a compiled call leaves in the graph and runs torch.library.opcheck on each.",
    "A fake formula that disagrees with the kernel in a stride or a type is found by users, in Inductor's code, years "
    "later.",
    "Run torch.library.opcheck yourself on the operator and arguments named in the message.",
)
LENGTHS: Final = Explanation(
    "Calls compiled code with four lengths: two traces at most.",
    "A plan that reads a length as a number makes a server compile for every prompt.",
    "TORCH_LOGS=recompiles names the guard that failed.",
)
GROWING: Final[dict[str, tuple[Callable[[str, Sample, int], Measured], frozenset[str]]]] = {
    "attention": (attention_lengths, frozenset({"dense", "small", "causal", "typical"})),
    "matmul": (matmul_lengths, frozenset({"small", "bias", "typical"})),
    "foreach": (foreach_lengths, frozenset({"small", "bitwise"})),
}
"""How calls of a family grow, and the tags that a sample may have whose calls do."""


def checks() -> Iterator[Check]:
    """Those of each family whose plans may leave operators of their own."""
    for family, (lengths, plain) in GROWING.items():

        def traceable(family: str = family) -> Iterator[Sample]:
            return _traceable(family)

        def growing(family: str = family, plain: frozenset[str] = plain) -> Iterator[Sample]:
            return (sample for sample in _traceable(family) if sample.tags <= plain)

        yield Check(f"{family}.compiled", EXPLANATION, traceable, compiled)
        yield Check(f"{family}.opcheck", OPCHECK, traceable, operators)
        yield Check(f"{family}.compiled_lengths", LENGTHS, growing, lengths)
