"""The fused matrix product by the portable Triton kernels: which problems they serve, and how a call is launched."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from torchhal._caches import Bounded
from torchhal.portable import unavailable
from torchhal.portable.fitting import fitting, on_device
from torchhal.portable.launch import Start, start
from torchhal.portable.matmul_launch import HALVES, Launcher, Operands, float32_precision
from torchhal.portable.matmul_tiles import PLAIN, Tiles, Tuning
from torchhal.portable.printer import TYPES
from torchhal.portable.replay import ALIGNMENT, MOST, Recording, keep
from torchhal.problems import Decline, MatmulClaims, MatmulProblem
from torchhal.products import packed
from torchhal.products.graphs import Function
from torchhal.products.packed import Operand
from torchhal.products.product import Multiply, Run
from torchhal.products.product import runner as product_runner

CLAIMS: Final = MatmulClaims(
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    batched=True,
    bias=True,
    a_prologue=True,
    b_prologue=True,
    epilogue=True,
    auxiliary_outputs=True,
    captured_tensors=True,
    packed_int8=True,
    packed_int4=True,
    packed_gguf=True,
    mixed_dtypes=True,
    backward=True,
    captured_gradient=True,
)
"""What the kernels do; a backend claims of it what it has tested on its hardware."""


def decline(problem: MatmulProblem) -> Decline | None:
    """Why the kernels do not serve a problem that :data:`CLAIMS` cover, or None."""
    missing = unavailable()
    if missing is not None:
        return missing
    unknown = sorted(str(dtype) for dtype in set(problem.out_dtypes) - TYPES.keys())
    if unknown:
        return Decline("out_dtype", f"the kernels write no {', '.join(unknown)}; ask for another out_dtype")
    return None if problem.packing is None else packed.decline(problem)


def runner(problem: MatmulProblem, who: str, multiply: Multiply | None = None) -> Run:
    """The ``run`` of a Plan, as :func:`torchhal.hookspecs.torchhal_matmul` has it. Needs Triton.

    Args:
        problem: what :func:`decline` lets pass.
        who: the backend, for messages.
        multiply: a :class:`Multiplier` with what depends on the hardware, or what chooses between one and another engine.
    """
    return product_runner(problem, who, multiply or Multiplier(PLAIN))


class Multiplier:
    """The kernel of a plan: :data:`torchhal.products.product.Multiply`, with what earlier calls have found out."""

    def __init__(self, tuning: Tuning, start: Start = start) -> None:
        self.launcher = Launcher(tuning, start)
        self.known: dict[Any, Tiles] = Bounded(MOST)
        """The tiles that were chosen, or the largest that fit, by what the choice depends on."""
        self.recordings: dict[Any, Recording] = Bounded(MOST)

    def __call__(
        self,
        a: Tensor,
        b: Tensor | Operand,
        bias: Tensor | None,
        functions: tuple[Function | None, Function | None, Function | None],
        out_dtypes: tuple[torch.dtype, ...],
    ) -> tuple[Tensor, ...]:
        shape = (a.shape[-2], b.shape[-1])
        if a.dim() != 2 or b.dim() != 2:
            batches = a.shape[:-2], () if isinstance(b, Operand) else b.shape[:-2]
            shape = (*torch.broadcast_shapes(*batches), *shape)  # type: ignore[no-untyped-call]
        outs = tuple([a.new_empty(shape, dtype=dtype) for dtype in out_dtypes])
        if outs[0].numel():
            call = Operands(a, b, bias, functions, outs)
            kind = _kind_of(call)
            with on_device(a):
                found = self.recordings.get(kind)
                if found is None:
                    self._first(kind, call)
                else:
                    parts = a.new_empty(found.workspace, dtype=torch.float32) if found.workspace else None
                    found.replay((*call.tensors(), parts))
        return outs

    def _first(self, kind: Any, call: Operands) -> None:
        """Serve a call of a kind that was not seen before, and record it."""
        recording = None if kind is None else Recording()
        work = self.launcher.work_of(call)
        tiles = self.known.get((work, kind)) or self.launcher.tuning.choose(work)
        found = fitting(self.launcher, tiles, call, work, recording)
        self.known[work, kind] = found
        keep(self.recordings, kind, recording)


def _kind_of(call: Operands) -> tuple[Any, ...] | None:
    """What the arguments of a call depend on beside pointers; None for a call that is not worth recording."""
    tensors = call.tensors()
    pointers = 0
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    if pointers % ALIGNMENT:
        return None
    graphs = [None if function is None else function.graph for function in call.functions]
    narrow = HALVES.issuperset((call.a.dtype, call.b.dtype, *[out.dtype for out in call.outs]))
    precision = "" if narrow else float32_precision(call.a.device.type)
    packing = None if isinstance(call.b, Tensor) else (call.b.weight.scheme, call.b.transposed)
    return (
        *graphs, packing, call.bias is None, precision,
        *[(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors],
    )  # fmt: skip
