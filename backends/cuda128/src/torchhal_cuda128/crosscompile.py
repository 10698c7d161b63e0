"""Compile the kernels for every GPU family, with no GPU: ``python -m torchhal_cuda128.crosscompile``.

Triton compiles for a target that it is told, and NVIDIA's assembler is a program like any other. Each family is compiled in
a process of its own, for a compiler that fails may take its process with it, with the oldest assembler that knows the
family: that of CUDA 12.8 where it can. What comes out is inspected: the matrix instructions that belong to the family and none
of another's, shared memory within what a block may have there, and no register spilt.

Nothing runs: that the numbers are right, only a device can say.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Final

from torchhal.portable.launch import Start
from torchhal_cuda128.crosscompile_cases import CASES, DEFAULT, compile_case
from torchhal_cuda128.tiles import MEASURED

OLDEST: Final = "12.8"
"""The first CUDA release whose assembler knows Blackwell, and the one that this backend promises to work with."""
ASSEMBLER_PACKAGE: Final = "nvidia-cuda-nvcc-cu12"


@dataclass(frozen=True)
class Family:
    """What one kind of GPU has, by the CUDA C++ Programming Guide's table of technical specifications."""

    capability: int
    shared: int
    """Bytes of shared memory that a block may have."""
    matrix: str
    """The instruction of its matrix units, in PTX."""
    foreign: tuple[str, ...]
    """Instructions that it does not have."""
    oldest: str | None
    """The CUDA release before which no assembler knows it, where that is :data:`OLDEST`; None for a later one."""


FAMILIES: Final = {
    "sm_90a": Family(90, 227 << 10, "wgmma.mma_async", ("tcgen05.",), OLDEST),
    "sm_100a": Family(100, 227 << 10, "tcgen05.mma", ("wgmma.",), OLDEST),
    "sm_103a": Family(103, 227 << 10, "tcgen05.mma", ("wgmma.",), None),
    "sm_120a": Family(120, 99 << 10, "mma.sync", ("tcgen05.", "wgmma."), OLDEST),
    "sm_121a": Family(121, 99 << 10, "mma.sync", ("tcgen05.", "wgmma."), None),
}
TENSOR_MEMORY: Final = 512
"""Columns of tensor memory of a multiprocessor of compute capability 10.x (PTX ISA, tcgen05.alloc)."""


@dataclass(frozen=True)
class Compiled:
    """What is known of one compiled kernel."""

    family: str
    case: str
    kernel: str
    assembler: str
    ptx: str
    registers: int
    spilled: int
    """Bytes stored and loaded because registers ran out."""
    shared: int
    tensor_memory: int
    """Columns."""
    instructions: dict[str, int]
    """How often each kind of matrix or tensor-copy instruction stands in the PTX."""
    matrix: bool
    """Whether the kernel has tiles that fill the family's matrix units."""
    rare: bool
    """Whether it does anything only where a result is not finite, so that its spills cost nothing."""

    def faults(self) -> list[str]:
        """What is wrong with it, in sentences; nothing if all is well.

        Spills are no fault where the tiles were timed on a device: the fastest ones for the gradients of keys spill on Hopper.
        """
        family = FAMILIES[self.family]
        name = f"{self.kernel} of {self.case} for {self.family}"
        found = []
        if self.matrix and not self.instructions.get(family.matrix):
            found.append(f"{name} must multiply by {family.matrix} and has none")
        found += [
            f"{name} has {count} of {word}, which {self.family} does not have"
            for word, count in self.instructions.items()
            if count and word.startswith(family.foreign)
        ]
        if self.shared > family.shared:
            found.append(
                f"{name} needs {self.shared} bytes of shared memory; a block has at most {family.shared}"
            )
        if self.tensor_memory > TENSOR_MEMORY:
            found.append(
                f"{name} needs {self.tensor_memory} columns of tensor memory; there are {TENSOR_MEMORY}"
            )
        if self.spilled and not self.rare and family.capability // 10 not in MEASURED:
            found.append(
                f"{name} spills {self.spilled} bytes of registers; choose smaller tiles or more warps"
            )
        return found


INSTRUCTIONS: Final = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async.bulk.tensor")


# ---------------------------------------------------------------------------- one family, in a process of its own


def compile_family(
    family: str, cases: Sequence[str], assembler: str, rare: bool = False
) -> Iterator[Compiled]:
    """Compile cases for a family, with the assembler that the environment names; ``rare`` kernels too, if asked."""
    pretend(FAMILIES[family].capability)
    for case in cases:
        compiled: list[Compiled] = []
        compile_case(
            CASES[case], FAMILIES[family].capability // 10, _starter(family, case, assembler, compiled, rare)
        )
        yield from compiled


def _starter(family: str, case: str, assembler: str, into: list[Compiled], every: bool) -> Start:
    """What a launcher starts kernels with: compiles them, and starts nothing."""

    def start(
        kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> Callable[..., object]:
        rare = constants.get("CLEAN", False)
        if rare and not every:
            return lambda *others: None
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            found = kernel.warmup(*arguments, grid=grid, **constants)
        if log.getvalue():  # or else another case has the same kernel
            name = kernel.__name__ + (", exact" if rare else "")
            matrix = CASES[case].matrix and "BLOCK_N" in constants
            into.append(inspect(found, log.getvalue(), family, case, name, assembler, matrix, rare))
        return lambda *others: None

    return start


def pretend(capability: int) -> None:
    """Make Triton compile for a GPU of a compute capability (90 for 9.0) in this process."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(Driver())


def inspect(
    compiled: Any, log: str, family: str, case: str, kernel: str, assembler: str, matrix: bool, rare: bool
) -> Compiled:
    """What the compiler's outputs say; ``log`` is what the assembler printed."""
    text = compiled.asm["ptx"]
    counts = {word: text.count(word) for word in INSTRUCTIONS}
    version = re.search(r"^\.version (\S+)", text, re.MULTILINE)
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not (version and registers and spills):
        raise RuntimeError(
            f"the assembler was expected to report registers and spills and printed: {log[:500]!r}"
        )
    return Compiled(
        family, case, kernel, assembler, version[1], int(registers[1]), sum(map(int, spills)),
        compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0) or 0, counts, matrix, rare,
    )  # fmt: skip


# ---------------------------------------------------------------------------- all of them


@functools.cache
def release_of(assembler: Path) -> str:
    """The CUDA release of an assembler, for example ``12.8``; empty where it does not run."""
    try:
        text = subprocess.run([assembler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else ""


def bundled(name: str) -> Path:
    """An assembler that came with Triton."""
    return Path(str(resources.files("triton"))) / "backends" / "nvidia" / "bin" / name


def oldest_assembler() -> Path | None:
    """The assembler of CUDA 12.8: Triton's own where it is that, or the one of NVIDIA's package."""
    candidates = [bundled("ptxas")]
    with contextlib.suppress(metadata.PackageNotFoundError):
        files = metadata.files(ASSEMBLER_PACKAGE) or ()
        candidates += [Path(str(file.locate())) for file in files if file.name == "ptxas"]
    return next((path for path in candidates if release_of(path) == OLDEST), None)


def assemblers(every: bool) -> list[tuple[str, Path]]:
    """Which family is assembled by what; a family twice where ``every`` asks for the newest assembler too.

    Raises:
        SystemExit: there is no assembler of CUDA 12.8; says how to get one.
    """
    oldest, newest = oldest_assembler(), bundled("ptxas-blackwell")
    if oldest is None:
        raise SystemExit(
            f"expected an assembler of CUDA {OLDEST} and found none: pip install {ASSEMBLER_PACKAGE}==12.8.93"
        )
    pairs = [(name, newest if family.oldest is None else oldest) for name, family in FAMILIES.items()]
    return list(dict.fromkeys([*pairs, *((name, newest) for name in FAMILIES if every)]))


def in_child(family: str, assembler: Path, cases: Sequence[str], rare: bool) -> list[Compiled]:
    """Compile one family in a process of its own.

    Raises:
        RuntimeError: the process failed; has the end of what it said.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ, "TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1",
            "TRITON_PTXAS_PATH": str(assembler), "TRITON_PTXAS_BLACKWELL_PATH": str(assembler),
        }  # fmt: skip
        environment.pop("TRITON_INTERPRET", None)
        command = [
            sys.executable,
            "-m",
            __spec__.name,
            "--child",
            family,
            *["--all"] * rare,
            "--cases",
            *cases,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling for {family} failed ({done.returncode}): {done.stderr[-2000:]}")
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def table(found: Sequence[Compiled]) -> str:
    """The compiled kernels as a table in Markdown."""
    lines = [
        "| family | assembler | PTX | case | kernel | matrix instructions | registers | spilt | shared memory | tensor memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        words = ", ".join(f"{count} {word}" for word, count in one.instructions.items() if count) or "none"
        memory = f"{one.tensor_memory} columns" if one.tensor_memory else "none"
        lines.append(
            f"| {one.family} | {one.assembler} | {one.ptx} | {one.case} | {one.kernel} | {words} | {one.registers} | "
            f"{one.spilled} B | {one.shared} B | {memory} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, and return how many faults were found."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="every case, the kernels that hardly ever do anything, and the newest assembler too",
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="these cases only")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--child", choices=list(FAMILIES), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    cases = given.cases or (list(CASES) if given.all else list(DEFAULT))
    if given.child:
        assembler = release_of(Path(os.environ["TRITON_PTXAS_PATH"]))
        for one in compile_family(given.child, cases, assembler, given.all):
            print(json.dumps(asdict(one)), flush=True)
        return 0
    with ThreadPoolExecutor(given.jobs) as pool:
        found = [
            one
            for part in pool.map(
                lambda pair: in_child(pair[0], pair[1], cases, given.all), assemblers(given.all)
            )
            for one in part
        ]
    print(table(found))
    faults = [fault for one in found for fault in one.faults()]
    print(
        f"\n{len(found)} kernels compiled with Triton {metadata.version('triton')}, {len(faults)} faults",
        *faults,
        sep="\n",
    )
    return len(faults)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
