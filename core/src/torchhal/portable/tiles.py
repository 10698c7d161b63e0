"""How large the tiles of the portable kernels are: what a backend tunes for its hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torchhal.problems import AttentionProblem


@dataclass(frozen=True)
class Tiles:
    """One way to cut a kernel's work, and what to run it with."""

    rows: int
    """Query rows of a tile: a power of two, at least 16."""
    keys: int
    """Keys of a tile: a power of two, at least 16."""
    warps: int = 4
    stages: int = 2
    """Tiles of keys in flight."""
    registers: int | None = None
    """Most registers of a thread, for compilers that take such a limit (``maxnreg``). The exact walk, which hardly ever
    runs, can ask for more than the fast one and so halve how many programs run side by side."""

    descriptors: bool = False
    """Whether keys and values of the dense layout are fetched by tensor descriptors, where their memory allows it."""

    def smaller(self) -> Tiles | None:
        """The next tiles to try where these need more of the device than it has; None after the smallest."""
        if self.stages > 1:
            return replace(self, stages=self.stages - 1)
        if self.keys > 16:
            return replace(self, keys=self.keys // 2)
        return replace(self, rows=self.rows // 2) if self.rows > 16 else None

    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


def padded(size: int) -> int:
    """The power of two that a head size is padded to, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def plain(problem: AttentionProblem) -> Tiles:
    """Tiles small enough for any device and head size."""
    widest = padded(max(problem.head_size, problem.value_head_size))
    return Tiles(rows=16, keys=32 if widest <= 128 else 16, warps=4, stages=1)


@dataclass(frozen=True)
class Tuning:
    """What depends on the hardware."""

    prefill: Callable[[AttentionProblem], Tiles]
    """For rows that fill a tile."""
    decode: Callable[[AttentionProblem], Tiles]
    """For a few rows over many keys."""
    query_gradient: Callable[[AttentionProblem], Tiles] = plain
    """For a tile of rows whose gradients are added up over keys."""
    key_gradient: Callable[[AttentionProblem], Tiles] = plain
    """For a tile of keys whose gradients, and those of values, are added up over rows."""
    programs: int = 16
    """How many programs of the decode kernel keep the device busy; keys are split until there are so many."""
    precision: str = "ieee"
    """How float32 products are computed: ``ieee``, or ``tf32x3`` where that is as accurate and faster."""


PLAIN = Tuning(prefill=plain, decode=plain)
"""Right everywhere and fast nowhere."""
