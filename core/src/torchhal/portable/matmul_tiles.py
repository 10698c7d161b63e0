"""How a portable matrix product is cut: what a backend tunes for its hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, NamedTuple


class Work(NamedTuple):
    """What the choice of tiles may depend on."""

    entries: int
    """Matrices of the batch."""
    rows: int
    columns: int
    inner: int
    """K."""
    mode: str
    """``half``: products of 16-bit numbers; ``split``: of the halves of wider ones; ``full``: of float32 numbers."""
    kind: str
    """``tensor``, or how the weight is packed: ``int8``, ``int4``, ``q4_0``, ``q4_1`` or ``q8_0``."""
    per: str = ""
    """How scales of a packed weight are applied: to the sum of a ``group`` or a ``channel``, or to each ``element``."""
    functions: bool = False
    """Whether an epilogue is compiled in."""


@dataclass(frozen=True)
class Tiles:
    """One way to cut a product, and what to run it with."""

    rows: int
    """Of a tile of the result: a power of two, at least 16."""
    columns: int
    """Likewise."""
    inner: int
    """Terms of the sum that are multiplied at a time: likewise."""
    warps: int = 4
    stages: int = 2
    """Pairs of operand tiles in flight."""
    band: int = 8
    """Rows of tiles that are computed side by side, for programs at work together to share what they read."""
    descriptors: bool = False
    """Whether operand tiles are fetched by tensor descriptors, where their memory allows it."""
    persistent: int = 0
    """Programs for each multiprocessor, which compute one tile after the other; 0 for a program for each tile."""
    parts: int = 1
    """Ranges of a tile's columns whose results are finished one after the other, for want of registers."""
    splits: int = 1
    """Parts of the sum at most, where tiles are too few for the device."""

    def smaller(self) -> Tiles | None:
        """The next tiles to try where these need more of the device than it has; None after the smallest."""
        if self.stages > 1:
            return replace(self, stages=self.stages - 1)
        if self.columns > 16:
            return replace(self, columns=self.columns // 2)
        return replace(self, rows=self.rows // 2) if self.rows > 16 else None

    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def plain(work: Work) -> Tiles:
    """Tiles small enough for any device."""
    return Tiles(16, 32, 32, splits=4 if work.rows <= 16 else 1)


@dataclass(frozen=True)
class Tuning:
    """What depends on the hardware."""

    choose: Callable[[Work], Tiles] = plain
    multiprocessors: int = 8
    """How many programs keep the device busy; the sum is cut into parts until there are so many."""
    shortest: int = 4
    """Steps of the sum below which another part of it costs more than it saves."""


PLAIN: Final = Tuning()
"""Right everywhere and fast nowhere."""
