"""Tiles of the portable matrix product for each architecture, as :mod:`torchhal_cuda128.tiles` has them for attention.

Those of Hopper were measured on an H100; those of Blackwell are where tuning would start, and are not served.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from torchhal.portable.matmul_tiles import Tiles, Tuning, Work
from torchhal_cuda128.hardware import Device

FEW: Final = 16
"""Rows that fit the smallest tile: what counts is how many bytes of ``b`` are on their way."""


def tuning(device: Device) -> Tuning:
    """The tiles for a device."""
    return tuning_of(device.capability[0], max(device.multiprocessors, 1))


def tuning_of(major: int, multiprocessors: int) -> Tuning:
    """The tiles for a compute capability major, tried or not."""
    return Tuning(TILES[major], multiprocessors)


def hopper(work: Work) -> Tiles:
    """Two warpgroups for large tiles, several programs side by side for small ones; float32 has no matrix unit."""
    if work.rows <= FEW:
        return hopper_few(work)
    if work.mode == "full":
        return Tiles(64, 64, 32, 4, 2)
    if work.rows <= 64 or work.columns <= 64:
        return Tiles(64, 64, 64, 4, 3, splits=8)
    if work.mode == "split" or work.kind != "tensor":
        return Tiles(64, 128, 64, 4, 3)
    if work.rows * work.columns * work.entries < LARGE:
        return Tiles(64, 128, 64, 4, 4)
    return Tiles(128, 256, 64, 8, 4, descriptors=True, persistent=1, parts=4 if work.functions else 1)


LARGE: Final = 2048 * 2048
"""Elements of a result from which on large tiles keep the device busy."""


def hopper_few(work: Work) -> Tiles:
    """Some 128 programs, and for each multiprocessor as many warps as hide what it takes to make numbers of bytes."""
    if work.mode == "full":
        return Tiles(16, 64, 32, 4, 2, splits=8)
    if work.per == "group":
        return (
            Tiles(16, 256, 64, 8, 4, splits=8) if work.kind == "int4" else Tiles(16, 128, 32, 4, 5, splits=8)
        )
    if work.per == "channel":
        return Tiles(16, 64, 256, 4, 3, splits=2)
    return Tiles(16, 64, 128, 4, 4, splits=2)


def data_centre_blackwell(work: Work) -> Tiles:
    """As on Hopper, with more warps where registers would be spilt."""
    found = hopper(work)
    return replace(found, warps=8) if work.mode == "full" and work.rows > FEW else found


def consumer_blackwell(work: Work) -> Tiles:
    """As on Hopper, within 99 KB of shared memory for a program."""
    found = data_centre_blackwell(work)
    if work.mode == "full" or found.rows * found.columns <= 64 * 64:
        return replace(found, stages=min(found.stages, 2))
    return Tiles(64, 64, 64, 4, 2) if work.mode == "split" else Tiles(128, 128, 32, 8, 3)


Choice = Callable[[Work], Tiles]

TILES: Final[Mapping[int, Choice]] = {9: hopper, 10: data_centre_blackwell, 12: consumer_blackwell}
"""Tiles by compute capability major."""
