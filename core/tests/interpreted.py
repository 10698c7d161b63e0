"""Triton's interpreter for the tests of portable kernels: NumPy in place of the device and its mathematics library.

With the name of a device in PORTABLE_DEVICE, and no TRITON_INTERPRET, the same tests run there.
"""

from __future__ import annotations

import linecache
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchhal.pointwise import Graph

DEVICE = os.environ.get("PORTABLE_DEVICE", "cpu")
"""Where the kernels compute."""

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from triton.language.extra import libdevice  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

from torchhal.operands import AttentionOperands  # noqa: E402
from torchhal.portable import printer  # noqa: E402
from torchhal.portable.attention import runner  # noqa: E402
from torchhal.portable.tiles import Tuning  # noqa: E402
from torchhal.problems import AttentionProblem  # noqa: E402


def _of_torch(name: str) -> Callable[..., Any]:
    compute = getattr(torch, name)

    def run(*arrays: Any) -> Any:
        return compute(*(torch.from_numpy(np.array(a, ndmin=1)) for a in arrays)).numpy()

    return run


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: _of_torch(name) for name in (
        "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "sin", "cos", "tan", "asin",
        "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "erfinv", "trunc", "pow",
        "atan2", "fmod", "copysign",
    )},
    "rint": np.rint,
}  # fmt: skip
"""The functions of the mathematics library, which the interpreter has not."""


def _interpreted(compute: Callable[..., Any]) -> Callable[..., Any]:
    def run(*operands: Any) -> Any:
        first = next(x for x in operands if isinstance(x, tl.tensor))
        dtype = first.dtype
        arrays = [x.handle.data if isinstance(x, tl.tensor) else np.array(x) for x in operands]
        shape = np.broadcast_shapes(*(a.shape for a in arrays))
        with np.errstate(all="ignore"):
            found = compute(*(a.astype(arrays[0].dtype) for a in arrays))
        data = np.asarray(found, dtype=first.handle.data.dtype).reshape(
            shape if first.type.is_block() or math.prod(shape) > 1 else (1,)
        )
        kind = (
            tl.block_type(dtype, list(shape))
            if any(x.type.is_block() for x in operands if isinstance(x, tl.tensor))
            else dtype
        )
        return tl.tensor(TensorHandle(data, dtype), kind)

    return run


_dot = InterpreterBuilder.create_dot


def _dot_of_halves(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter multiplies the bits of bfloat16 numbers as integers; widened, they are numbers."""
    wide = [self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)]
    return _dot(self, *wide, *rest)


_cast = InterpreterBuilder.cast_impl


def _cast_to_nearest(self: Any, source: Any, target: Any) -> Any:
    """The interpreter cuts float32 off to make bfloat16, and knows no way from integers; hardware rounds."""
    if target.scalar != tl.bfloat16 or source.dtype.scalar in (tl.bfloat16, tl.float16, tl.float64):
        return _cast(self, source, target)
    source = source if source.dtype.scalar == tl.float32 else _cast(self, source, tl.float32)
    rounded = torch.from_numpy(np.array(source.data, ndmin=1)).bfloat16().view(torch.uint16).numpy()
    return TensorHandle(rounded.reshape(source.data.shape), tl.bfloat16)


_subtract = InterpreterBuilder.create_fsub


def _subtract_halves(self: Any, a: Any, b: Any) -> Any:
    """The interpreter subtracts the bits of bfloat16 numbers, as it multiplies them."""
    if a.dtype.scalar != tl.bfloat16:
        return _subtract(self, a, b)
    wide = [self.cast_impl(x, tl.float32) for x in (a, b)]
    return self.cast_impl(_subtract(self, *wide), tl.bfloat16)


if DEVICE == "cpu":
    InterpreterBuilder.create_fsub = _subtract_halves
    InterpreterBuilder.create_dot = _dot_of_halves
    InterpreterBuilder.cast_impl = _cast_to_nearest
    for _name, _compute in FUNCTIONS.items():
        setattr(libdevice, _name, _interpreted(_compute))


def _kernel(count: int) -> Any:
    """A kernel over ``count`` inputs, printed, for Triton has no argument lists."""
    loads = ", ".join(f"tl.load(inputs[{i}] + lanes)" for i in range(count))
    text = (
        "@triton.jit\ndef apply(inputs, captured, output, function: tl.constexpr, SIZE: tl.constexpr):\n"
        f"    lanes = tl.arange(0, SIZE)\n    found = function({loads}, captured)\n"
        "    tl.store(output + lanes, tl.broadcast_to(found, (SIZE,)))\n"
    )
    name = f"<apply {count}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    exec(compile(text, name, "exec"), space)
    return space["apply"]


def evaluate(graph: Graph, inputs: Sequence[Tensor], captured: Sequence[Tensor] = ()) -> Tensor:
    """The graph's one output over 1-dim inputs of one length, a power of two, by its printed function."""
    size = inputs[0].shape[0]
    given, read = ([tensor.to(DEVICE) for tensor in tensors] for tensors in (inputs, captured))
    output = torch.empty(size, dtype=graph.output_dtypes[0], device=DEVICE)
    function = printer.function(graph, printer.is_wide(captured))
    with np.errstate(all="ignore"):
        _kernel(len(inputs))[(1,)](tuple(given), printer.flatten(read), output, function, size)
    return output.cpu()


def attention(tuning: Tuning) -> Callable[..., tuple[Tensor, Tensor]]:
    """The portable attention with a tuning, called as the reference is; results come back to the CPU."""
    runs: dict[AttentionProblem, Callable[..., Any]] = {}

    def compute(problem: AttentionProblem, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, scale, operands = arguments
        moved = [None if tensor is None else moved_as_it_is(tensor) for tensor in tensors]
        named = {f.name: getattr(operands, f.name) for f in fields(operands)}
        for name, value in named.items():
            if isinstance(value, Tensor):
                named[name] = moved_as_it_is(value)
            elif isinstance(value, tuple):
                named[name] = tuple(moved_as_it_is(tensor) for tensor in value)
        with np.errstate(all="ignore"):
            run = runs.setdefault(problem, runner(problem, tuning))
            out, lse = run(*moved, scale, AttentionOperands(**named))
        return out.cpu(), lse.cpu()

    return compute


def moved_as_it_is(tensor: Tensor) -> Tensor:
    """On the device, with the strides that it has here."""
    if DEVICE == "cpu":
        return tensor
    whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).to(
        DEVICE
    )
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
