"""Tiles of the portable kernels for each architecture: chosen by family, never by "at least".

The numbers of Hopper were measured on an H100. Those of Blackwell are where tuning would start: nothing has run there, so
they are not served. :mod:`torchhal_cuda128.crosscompile` compiles the kernels with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, NamedTuple

import torch

from torchhal.portable.tiles import Tiles, Tuning, padded
from torchhal.problems import AttentionProblem, Decline, Problem
from torchhal_cuda128.hardware import Device, Hardware, unsuitable

Choice = Callable[[AttentionProblem], Tiles]

MEASURED: Final = frozenset({9})
"""Compute capability majors on which the kernels have run."""


def tuning(device: Device) -> Tuning:
    """The tiles for a device."""
    return tuning_of(device.capability[0], max(device.multiprocessors, 1))


def device_of(problem: Problem, hardware: Hardware) -> Device | Decline:
    """The device of a problem, or why no kernel is served there: it is unsuitable, or their like has never run on it."""
    index = problem.device.index or 0
    verdict = unsuitable(hardware, index)
    if verdict is not None:
        return verdict
    device = hardware.devices[index]
    major, minor = device.capability
    if major in MEASURED:
        return device
    found = f"{device.name} has compute capability {major}.{minor}"
    return Decline(
        "architecture_untried", f"{found}; the kernels have never run on that, and so are not served"
    )


def tuning_of(major: int, multiprocessors: int) -> Tuning:
    """The tiles for a compute capability major, tried or not."""
    return Tuning(**TILES[major]._asdict(), programs=multiprocessors)


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


def hopper_query_gradient(problem: AttentionProblem) -> Tiles:
    """Three products for each tile of keys, and one sum in registers: 488 and 517 TFLOP/s at head sizes 64 and 128, causal."""
    size = widest(problem)
    if problem.query_dtype is torch.float32 or size > 256:
        return Tiles(16, 16, 4, 1)
    if size <= 64:
        return Tiles(64, 64, 4, 3)
    return Tiles(128, 64, 8, 3) if size <= 128 else Tiles(64, 32, 8, 1)


def hopper_key_gradient(problem: AttentionProblem) -> Tiles:
    """Four products for each tile of rows, and two sums in registers: 313 and 335 TFLOP/s at head sizes 64 and 128, causal."""
    size = widest(problem)
    if problem.query_dtype is torch.float32 or size > 256:
        return Tiles(16, 16, 4, 1)
    if size <= 64:
        return Tiles(128, 64, 4, 1)
    return Tiles(32, 64, 4, 2) if size <= 128 else Tiles(32, 64, 8, 1)


def consumer_blackwell_prefill(problem: AttentionProblem) -> Tiles:
    """As on Hopper, within 99 KB of shared memory for a program."""
    size = widest(problem)
    if problem.query_dtype is torch.float32 or size > 256:
        return Tiles(16, 16, 4, 1)
    if size <= 64:
        return Tiles(64, 64, 4, 2)
    return Tiles(64, 32, 4, 2) if size <= 128 else Tiles(32, 32, 4, 1)


def consumer_blackwell_decode(problem: AttentionProblem) -> Tiles:
    """As on Hopper, with fewer keys on their way."""
    size = widest(problem)
    if problem.query_dtype is torch.float32 or size > 256:
        return Tiles(16, 16, 4, 1)
    return Tiles(16, 64, 4, 2) if size <= 128 else Tiles(16, 32, 4, 1)


def consumer_blackwell_gradient(problem: AttentionProblem) -> Tiles:
    """Of queries, and of keys and values: what compiles without spilling registers."""
    size = widest(problem)
    if problem.query_dtype is torch.float32 or size > 128:
        return Tiles(16, 16, 4, 1)
    return Tiles(32, 32, 4, 1)


def data_centre_blackwell_prefill(problem: AttentionProblem) -> Tiles:
    """As on Hopper, without its limit of registers, within which it would spill.

    With a function in it the assembler of CUDA 13.1 would stop at 168 on its own, and spill, if it were not given them all.
    """
    return replace(hopper_prefill(problem), registers=None if problem.score_mod is None else 255)


def data_centre_blackwell_gradient(problem: AttentionProblem) -> Tiles:
    """Of queries, and of keys and values: tiles that fill the matrix units and compile without spilling registers."""
    size = widest(problem)
    if problem.query_dtype is torch.float32 or size > 256:
        return Tiles(16, 16, 4, 1)
    return Tiles(64, 64, 8, 1) if size <= 128 else Tiles(64, 32, 8, 1)


class Choices(NamedTuple):
    """The tiles of each kernel, as :class:`~torchhal.portable.tiles.Tuning` names them."""

    prefill: Choice
    decode: Choice
    query_gradient: Choice
    key_gradient: Choice


TILES: Final[Mapping[int, Choices]] = {
    9: Choices(hopper_prefill, hopper_decode, hopper_query_gradient, hopper_key_gradient),
    10: Choices(
        data_centre_blackwell_prefill,
        hopper_decode,
        data_centre_blackwell_gradient,
        data_centre_blackwell_gradient,
    ),
    12: Choices(
        consumer_blackwell_prefill,
        consumer_blackwell_decode,
        consumer_blackwell_gradient,
        consumer_blackwell_gradient,
    ),
}
"""Tiles by compute capability major."""
