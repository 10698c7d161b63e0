"""What is compiled for GPUs that are not here is judged by what those have, and compiles."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchhal_cuda128 import crosscompile
from torchhal_cuda128.crosscompile import Compiled

GOOD = Compiled(
    "sm_100a",
    "prefill",
    "attention_kernel",
    "12.8",
    "8.7",
    128,
    0,
    60000,
    128,
    {"tcgen05.mma": 8},
    True,
    False,
)


@pytest.mark.parametrize(("fields", "words"), [
    ({"instructions": {"mma.sync": 64}}, "must multiply by tcgen05.mma and has none"),
    ({"family": "sm_120a", "instructions": {"mma.sync": 1, "tcgen05.mma": 8}}, "has 8 of tcgen05.mma, which sm_120a does not have"),
    ({"instructions": {"tcgen05.mma": 8, "wgmma.mma_async": 2}}, "has 2 of wgmma.mma_async, which sm_100a does not have"),
    ({"shared": 232_449}, "needs 232449 bytes of shared memory; a block has at most 232448"),
    ({"family": "sm_121a", "instructions": {"mma.sync": 1}, "shared": 101_377}, "a block has at most 101376"),
    ({"tensor_memory": 513}, "needs 513 columns of tensor memory; there are 512"),
    ({"spilled": 8}, "spills 8 bytes of registers; choose smaller tiles or more warps"),
])  # fmt: skip
def test_each_fault_is_a_sentence(fields: dict[str, Any], words: str) -> None:
    (fault,) = replace(GOOD, **fields).faults()
    assert words in fault
    assert fault.startswith("attention_kernel of prefill for sm_1")


@pytest.mark.parametrize("fields", [
    {},
    {"matrix": False, "instructions": {"mma.sync": 64}},
    {"rare": True, "spilled": 999},
    {"family": "sm_90a", "instructions": {"wgmma.mma_async": 2}, "spilled": 8},
    {"family": "sm_120a", "instructions": {"mma.sync": 2}, "shared": 101_376, "tensor_memory": 0},
])  # fmt: skip
def test_what_is_as_it_should_be_has_no_fault(fields: dict[str, Any]) -> None:
    assert replace(GOOD, **fields).faults() == []


def test_without_the_oldest_assembler_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(crosscompile, "release_of", lambda path: "13.1")
    with pytest.raises(
        SystemExit, match=r"assembler of CUDA 12\.8 .*pip install nvidia-cuda-nvcc-cu12==12\.8\.93"
    ):
        crosscompile.assemblers(False)


def test_a_program_that_is_no_assembler_has_no_release() -> None:
    crosscompile.release_of.cache_clear()
    assert crosscompile.release_of(Path("/nowhere/ptxas")) == ""


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 134, "", "Assertion failed")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    with pytest.raises(RuntimeError, match=r"compiling for sm_100a failed \(134\): Assertion failed"):
        crosscompile.in_child("sm_100a", Path("ptxas"), ["decode-128"], False)


@pytest.mark.parametrize("family", ["sm_100a", "sm_120a"])
def test_prefill_compiles_for_blackwell_with_the_matrix_instructions_of_its_family(family: str) -> None:
    pytest.importorskip("triton")
    assembler = crosscompile.oldest_assembler() or crosscompile.bundled("ptxas-blackwell")
    (found,) = crosscompile.in_child(family, assembler, ["prefill-64-causal"], False)
    assert found.faults() == []
    assert found.instructions[crosscompile.FAMILIES[family].matrix] > 0
    assert f"| {family} |" in crosscompile.table([found])
