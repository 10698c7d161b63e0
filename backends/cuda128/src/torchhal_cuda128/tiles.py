"""Tiles of the portable kernels for each architecture: chosen by family, never by "at least".

The numbers of Hopper were measured on an H100. Those of Blackwell are where tuning would start: nothing has run there, so
they are not served, and for compute capability 10.x the compiler of Triton 3.6 fails on the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch

from torchhal.portable.tiles import Tiles, Tuning, padded
from torchhal.problems import AttentionProblem, Decline
from torchhal_cuda128.hardware import Device

Choice = Callable[[AttentionProblem], Tiles]

MEASURED: Final = frozenset({9})
"""Compute capability majors on which the kernels have run."""


def tuning(device: Device) -> Tuning | Decline:
    """The tiles for a device, or why there are none that have been tried."""
    major = device.capability[0]
    if major not in MEASURED:
        found = f"{device.name} has compute capability {major}.{device.capability[1]}"
        return Decline(
            "architecture_untried",
            f"{found}; the kernels have never run on that, and so are not served",
        )
    prefill, decode = TILES[major]
    return Tuning(prefill, decode, programs=max(device.multiprocessors, 1))


def widest(problem: AttentionProblem) -> int:
    """The larger head size, as it is padded."""
    return padded(max(problem.head_size, problem.value_head_size))


def hopper_prefill(problem: AttentionProblem) -> Tiles:
    """One warpgroup over 64 rows, of which two or more run side by side; float32 has no matrix unit and smaller tiles."""
    size = widest(problem)
    if problem.query_dtype is torch.float32:
        return Tiles(32, 32, 4, 2) if size <= 128 else Tiles(16, 16, 4, 1)
    if size <= 64:
        return Tiles(64, 64, 4, 3, registers=128, descriptors=True)
    if size <= 128:
        return Tiles(64, 64, 4, 3, descriptors=True)
    if size <= 256:
        return Tiles(64, 64, 8, 2, descriptors=True)
    return Tiles(32, 32, 8, 1)


def hopper_decode(problem: AttentionProblem) -> Tiles:
    """Few rows: what counts is how many bytes of keys are on their way."""
    size = widest(problem)
    if problem.query_dtype is torch.float32:
        return Tiles(16, 32, 4, 2) if size <= 128 else Tiles(16, 16, 4, 1)
    if size <= 128:
        return Tiles(16, 64, 4, 3)
    if size <= 256:
        return Tiles(16, 64, 4, 2)
    return Tiles(16, 32, 4, 1)


def consumer_blackwell_prefill(problem: AttentionProblem) -> Tiles:
    """As on Hopper, within 99 KB of shared memory for a program."""
    size = widest(problem)
    if problem.query_dtype is torch.float32 or size > 256:
        return Tiles(16, 16, 4, 1)
    return Tiles(64, 64, 4, 2) if size <= 128 else Tiles(32, 32, 4, 1)


def consumer_blackwell_decode(problem: AttentionProblem) -> Tiles:
    """As on Hopper, with fewer keys on their way."""
    size = widest(problem)
    if problem.query_dtype is torch.float32 or size > 256:
        return Tiles(16, 16, 4, 1)
    return Tiles(16, 64, 4, 2) if size <= 128 else Tiles(16, 32, 4, 1)


TILES: Final[Mapping[int, tuple[Choice, Choice]]] = {
    9: (hopper_prefill, hopper_decode),
    10: (hopper_prefill, hopper_decode),
    12: (consumer_blackwell_prefill, consumer_blackwell_decode),
}
"""Tiles of prefill and decode by compute capability major."""
