"""What ``torchhal bench matmul`` times: fused products, as our backends and as torch compute them, in turns.

A kind of product is a subclass of :class:`Case`: it makes operands, says how to call torchhal and its peers, and what the
result is in float64. :data:`CASES` lists the calls that are measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import torchhal
from torchhal._text import dtype_name
from torchhal.bench.cases import Requirement
from torchhal.bench.ceilings import Ceilings
from torchhal.bench.timing import Effort, Timing, interleaved, synchronizer

Operands = Mapping[str, Any]
Call = Callable[[], Tensor]
COMPILED: Final = "torch compiled"


@dataclass(frozen=True)
class Case(ABC):
    """One product of (rows, inner) by (inner, columns); a subclass says of which kind."""

    kind: ClassVar[str]
    """What sort of product it is, in a few words."""
    baseline: ClassVar[str] = "torch"
    """The peer that speed-ups are relative to."""

    name: str
    rows: int = 2048
    columns: int = 2048
    inner: int = 2048
    dtype: torch.dtype = torch.float32
    requirements: tuple[Requirement, ...] = ()

    @property
    def flops(self) -> float:
        """Additions and multiplications of the product itself."""
        return 2.0 * self.rows * self.columns * self.inner

    @property
    def bytes(self) -> float:
        """Each operand and the result, once."""
        elements = self.rows * self.inner + self.inner * self.columns + self.rows * self.columns
        return float(elements * self.dtype.itemsize)

    @abstractmethod
    def operands(self, device: torch.device) -> Operands:
        """Random operands, the same in every run."""

    @abstractmethod
    def ours(self, operands: Operands, backend: str) -> Tensor:
        """The call of torchhal."""

    @abstractmethod
    def peers(self, operands: Operands, compiled: bool) -> dict[str, Call]:
        """Other ways to compute it; ``compiled`` for those that torch.compile takes seconds for."""

    @abstractmethod
    def exact(self, operands: Operands, rows: Tensor) -> Tensor:
        """Some rows of the result, in float64."""

    def quick(self) -> Case:
        """A smaller one of the kind."""
        return replace(
            self, rows=min(self.rows, 128), columns=min(self.columns, 256), inner=min(self.inner, 256)
        )

    def random(self, device: torch.device, *shape: int) -> Tensor:
        """Normal numbers in the case's type."""
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator).to(device, self.dtype)


@dataclass(frozen=True)
class Gemm(Case):
    """A plain product, ``b`` with contiguous rows, or as the transpose of an ``nn.Linear.weight``."""

    kind: ClassVar[str] = "a @ b"
    transposed: bool = False

    def operands(self, device: torch.device) -> Operands:
        b = self.random(device, self.columns, self.inner)
        return {
            "a": self.random(device, self.rows, self.inner),
            "b": b.mT if self.transposed else b.mT.contiguous(),
        }

    def ours(self, operands: Operands, backend: str) -> Tensor:
        return torchhal.matmul(operands["a"], operands["b"], backend=backend)  # type: ignore[return-value]

    def peers(self, operands: Operands, compiled: bool) -> dict[str, Call]:
        a, b = operands["a"], operands["b"]
        found: dict[str, Call] = {"torch": lambda: torch.mm(a, b)}
        if self.dtype is not torch.float32:
            wide_a, wide_b = a.float(), b.float()
            found["torch float32"] = lambda: torch.mm(wide_a, wide_b)
        return found

    def exact(self, operands: Operands, rows: Tensor) -> Tensor:
        return cast(Tensor, operands["a"][rows].double() @ operands["b"].double())


@dataclass(frozen=True)
class SwiGLU(Case):
    """RMSNorm, gate and up projections, and SwiGLU: two products, the second of which gates in its epilogue."""

    kind: ClassVar[str] = "RMSNorm, gate, up, SwiGLU"
    baseline: ClassVar[str] = "torch"

    @property
    def flops(self) -> float:
        return 2.0 * super().flops

    @property
    def bytes(self) -> float:
        return super().bytes + float(self.inner * self.columns * self.dtype.itemsize)

    def operands(self, device: torch.device) -> Operands:
        gate, up = (self.random(device, self.columns + i, self.inner)[i:] * self.inner**-0.5 for i in (0, 1))
        return {"x": self.random(device, self.rows, self.inner), "gate": gate, "up": up}

    def ours(self, operands: Operands, backend: str) -> Tensor:
        x, gate, up = operands["x"], operands["gate"], operands["up"]
        scale = torch.rsqrt(x.float().square().mean(-1) + 1e-6)

        def normalized(v: Tensor, b: Tensor, m: Tensor, k: Tensor) -> Tensor:
            return v * scale[m]

        gated = cast(
            Tensor, torchhal.matmul(x, gate.mT, a_prologue=normalized, epilogue=F.silu, backend=backend)
        )
        return torchhal.matmul(  # type: ignore[return-value]
            x,
            up.mT,
            a_prologue=normalized,
            epilogue=lambda v, b, m, n: v * gated[m, n].float(),
            backend=backend,
        )

    def peers(self, operands: Operands, compiled: bool) -> dict[str, Call]:
        x, gate, up = operands["x"], operands["gate"], operands["up"]

        def plain(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
            normal = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
            return _silu(F.linear(normal, gate)) * F.linear(normal, up)

        found: dict[str, Call] = {"torch": lambda: plain(x, gate, up)}
        if compiled:
            made = torch.compile(plain)
            found[COMPILED] = lambda: made(x, gate, up)
        return found

    def exact(self, operands: Operands, rows: Tensor) -> Tensor:
        x = operands["x"][rows].double()
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        gate, up = (cast(Tensor, normal @ operands[name].double().mT) for name in ("gate", "up"))
        return _silu(gate) * up


def _silu(x: Tensor) -> Tensor:
    return F.silu(x)


_SHORT: Final = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _each_type(case: Case, **requirements: tuple[Requirement, ...]) -> list[Case]:
    return [
        replace(case, name=f"{case.name}-{short}", dtype=dtype, requirements=requirements.get(short, ()))
        for dtype, short in _SHORT.items()
    ]


def _square(side: int) -> Gemm:
    return Gemm(f"gemm-{side}", rows=side, columns=side, inner=side)


CASES: Final[tuple[Case, ...]] = (
    *_each_type(_square(2048), f32=(Requirement("torch", 0.95),), bf16=(Requirement("torch float32", 0.9),)),
    *(case for side in (512, 256, 128, 64) for case in _each_type(_square(side))),
    *_each_type(Gemm("linear-1-4096", rows=1, columns=4096, inner=4096, transposed=True)),
    *_each_type(Gemm("linear-16-4096", rows=16, columns=4096, inner=4096, transposed=True)),
    *_each_type(
        SwiGLU("swiglu-512-576-1536", rows=512, columns=1536, inner=576),
        f32=(Requirement(COMPILED, 1.15),),
        bf16=(Requirement(COMPILED, 1.15),),
    ),
    *_each_type(
        SwiGLU("swiglu-512-2048-5632", rows=512, columns=5632, inner=2048),
        f32=(Requirement(COMPILED, 1.15),),
        bf16=(Requirement(COMPILED, 1.15),),
    ),
)
"""Large and small products, layers of one token and of several, and the first half of a gated MLP."""


# ---------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Row:
    """One candidate on one case."""

    candidate: str
    ours: bool
    timing: Timing | None = None
    error: float = float("inf")
    """The largest error of the rows that were looked at, relative to the largest result."""
    not_run: str = ""

    def passed(self, dtype: torch.dtype) -> bool:
        """Whether the result is right."""
        return not self.not_run and self.error <= tolerance(dtype)


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative error of a right result: peers round in between, and sum thousands of terms in float32."""
    return 1e-4 if dtype is torch.float32 else 8 * torch.finfo(dtype).eps


@dataclass(frozen=True)
class CaseResult:
    """All candidates on one case."""

    case: Case
    rows: list[Row] = field(default_factory=list)

    def timing(self, candidate: str) -> Timing | None:
        """The times of a candidate, None if it was not run or is wrong."""
        return next(
            (r.timing for r in self.rows if r.candidate == candidate and r.passed(self.case.dtype)), None
        )

    def speedup(self, row: Row, against: str | None = None) -> float | None:
        """How many times faster than a peer a candidate is, by medians; the baseline where none is named."""
        peer, own = self.timing(against or self.case.baseline), self.timing(row.candidate)
        return None if peer is None or own is None else peer.median / own.median

    def verdicts(self, row: Row) -> list[tuple[Requirement, float | None]]:
        """What a backend has to reach on the case and what it reached; nothing for peers."""
        return [(r, self.speedup(row, r.against)) for r in self.case.requirements] if row.ours else []

    def to_dict(self, limits: Ceilings) -> dict[str, Any]:
        """Numbers for JSON."""
        case = self.case
        return {
            "case": case.name, "kind": case.kind, "dtype": dtype_name(case.dtype), "rows": case.rows, "columns": case.columns,
            "inner": case.inner, "flops": case.flops, "bytes": case.bytes, "baseline": case.baseline,
            "candidates": [self._row_dict(row, limits) for row in self.rows],
        }  # fmt: skip

    def _row_dict(self, row: Row, limits: Ceilings) -> dict[str, Any]:
        start: dict[str, Any] = {"candidate": row.candidate, "ours": row.ours}
        if row.timing is None:
            return {**start, "not_run": row.not_run}
        needed = [
            {
                "against": r.against,
                "ratio": r.ratio,
                "measured": found,
                "passed": found is not None and found >= r.ratio,
            }
            for r, found in self.verdicts(row)
        ]
        seconds = row.timing.median
        return {
            **start, "seconds": row.timing.to_dict(), "speedup": self.speedup(row), "gflops": self.case.flops / seconds / 1e9,
            "gbps": self.case.bytes / seconds / 1e9, "compute_share": limits.compute_share(self.case.flops, seconds),
            "read_share": limits.read_share(self.case.bytes, seconds), "max_error": row.error,
            "passed": row.passed(self.case.dtype), "requirements": needed,
        }  # fmt: skip


def measure(
    case: Case, backends: Sequence[str], device: torch.device, effort: Effort, compiled: bool = False
) -> CaseResult:
    """Check every candidate on one case, then time those that ran, in turns."""
    operands = case.operands(device)
    looked_at = torch.arange(0, case.rows, max(1, case.rows // 8), device=device)
    exact = case.exact(operands, looked_at)
    calls: dict[str, Call] = {name: _bound(case, operands, name) for name in backends}
    calls.update(case.peers(operands, compiled))
    rows = [_checked(name, name in backends, call, exact, looked_at) for name, call in calls.items()]
    ran = {row.candidate: calls[row.candidate] for row in rows if not row.not_run}
    timings = interleaved(ran, effort, synchronizer(device))
    return CaseResult(case, [replace(row, timing=timings.get(row.candidate)) for row in rows])


def _bound(case: Case, operands: Operands, backend: str) -> Call:
    return lambda: case.ours(operands, backend)


def _checked(name: str, ours: bool, call: Call, exact: Tensor, rows: Tensor) -> Row:
    try:
        found = call()[rows].double()
    except Exception as fault:  # a candidate that fails is a result
        return Row(name, ours, not_run=f"raised {type(fault).__name__}: {' '.join(str(fault).split())[:200]}")
    return Row(name, ours, error=((found - exact).abs().max() / exact.abs().max()).item())
