"""The growth of memory with length: the fit, what is told where it can not be measured, and a planted quadratic."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchhal.bench import catalogue, memory
from torchhal.bench.memory import Growth, exponent
from torchhal.registry import registry

CPU = torch.device("cpu")
CASE = catalogue.MEMORY[0]
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux, whose processes can set their peak back"
)


@given(power=st.floats(0.5, 3.0), factor=st.integers(1000, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_exponent_of_a_power_law_is_its_power(power: float, factor: int) -> None:
    peaks = {n: int(factor * n**power) for n in memory.LENGTHS}
    assert exponent(peaks) == pytest.approx(power, abs=1e-3)


def test_quadratic_growth_misses_the_bar_and_linear_passes_it() -> None:
    assert Growth(CASE, "b", {1024: 10 << 20, 2048: 20 << 20}).passed is True
    assert Growth(CASE, "b", {1024: 10 << 20, 2048: 40 << 20}).passed is False


def test_nothing_is_judged_without_two_points_above_zero() -> None:
    assert exponent({1024: 0, 2048: 5}) is None
    growth = Growth(CASE, "b", {}, not_run="declined: no [no]")
    assert growth.passed is None and growth.to_dict()["not_run"] == "declined: no [no]"


def test_devices_other_than_the_cpu_are_told_to_be_out_of_reach() -> None:
    (first, *_) = memory.growths([registry().get("reference")], torch.device("meta"))
    assert first.not_run == "peak memory is measured for the CPU, not for meta" and first.peaks == {}


@linux
def test_a_call_that_keeps_all_scores_grows_quadratically_in_processes_of_its_own() -> None:
    peaks = {n: memory._in_a_process("reference", CASE.name, n) for n in (512, 1024)}
    scores = 4 * CASE.heads * 1024 * 1024
    assert peaks[1024] >= scores
    assert exponent(peaks) == pytest.approx(2.0, abs=0.3)
    assert Growth(CASE, "reference", peaks).passed is False


@linux
def test_a_process_that_fails_is_told_with_its_last_words() -> None:
    with pytest.raises(RuntimeError, match="ended with exit code 1: .*no backend is called 'nobody'"):
        memory._in_a_process("nobody", CASE.name, 64)


def test_every_case_of_memory_is_square_and_can_be_resized() -> None:
    for case in catalogue.MEMORY:
        smaller = case.resized(64)
        assert (smaller.length, smaller.keys) == (64, 64)
        assert dataclasses.replace(smaller, length=case.length, keys=case.keys) == case
