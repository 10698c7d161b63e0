"""Runs the tests of cpu_x86's native library under the address and the undefined-behaviour sanitizer.

    python3 tools/sanitize.py [--all] [PYTEST ARGUMENTS]

Builds the library with GCC's or Clang's sanitizers beside the ordinary one and loads it in its place; AMX is emulated in
it, for the sanitizers know nothing of what its instructions read and write. Every read or write out of bounds and every
operation C++ leaves undefined ends the run with a report. Needs what ``dev.py setup`` installs, and Linux. It runs the
tests with the mark ``sanitized``, which read and write at every edge: odd sizes, strides, sequences and pages, damaged
input. ``--all`` runs every test of the kernels, which takes several times as long.

There is no run under the thread sanitizer: it sees only synchronisation it has instrumented, and the threads are those
of torch's OpenMP runtime (libgomp), which nobody has instrumented, so it reports a race for every hand-over of work. What
threads share is little: the call's description, which nobody writes once it has been made; an atomic counter, which gives
each item to one thread (tasks.hpp); and memory that items write to, of which each has its own. Those are the rows of the
output, and partial results (schedule.cpp); panels of a matrix product, each written by one task and read after the join
(matmul.cpp); in a backward pass the rows of the query's gradient, and sums of keys, values, masks and captured tensors, of
which items that could meet in one place have a copy each (gradients.cpp). What is merged is merged after the join, by one
thread or again with places of its own for each item. The tests compare results of one and of several threads to the bit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
BACKEND: Final = ROOT / "backends/cpu_x86"
FLAGS: Final = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
TESTS: Final = (
    "test_native.py",
    "test_programs.py",
    "test_flex.py",
    "test_quantized_pages.py",
    "test_gradients.py",
    "test_gradient_programs.py",
    "test_matmul.py",
    "test_packed.py",
    "test_chains.py",
    "test_max_scores.py",
    "test_maps.py",
)


def build(folder: Path) -> Path:
    """The library with sanitizers."""
    cmake = shutil.which(
        "cmake", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    )
    if cmake is None:
        raise SystemExit(
            "cmake is not there; run tools/dev.py setup first, and this with the Python of .venv"
        )
    configure = [
        cmake,
        "-S",
        str(BACKEND),
        "-B",
        str(folder),
        "-DCMAKE_BUILD_TYPE=",
        f"-DCMAKE_CXX_FLAGS={FLAGS}",
        "-DTORCHHAL_OPTIMIZATION=-O1",
        "-DTORCHHAL_EMULATE_AMX=ON",
    ]
    for command in (configure, [cmake, "--build", str(folder), "--parallel", str(os.cpu_count())]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "_native.so"


def runtime(name: str) -> str:
    """Path of a sanitizer's runtime, which has to be loaded before Python."""
    compiler = os.environ.get("CXX", "c++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def main(arguments: list[str]) -> int:
    """Build, then run the tests; the status of pytest."""
    library = build(BACKEND / "build/sanitized")
    environment = {
        **os.environ,
        "TORCHHAL_CPU_X86_LIBRARY": str(library),
        "PYTHONPATH": str(BACKEND / "src"),  # what is installed may be older than the library
        # libstdc++ too: torch throws exceptions, which the sanitizer's runtime has to find at its start.
        "LD_PRELOAD": " ".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python keeps much to its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    tests = [str(BACKEND / "tests" / name) for name in TESTS]
    chosen = [] if "--all" in arguments else ["-m", "sanitized"]
    rest = [argument for argument in arguments if argument != "--all"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *chosen, *rest]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
