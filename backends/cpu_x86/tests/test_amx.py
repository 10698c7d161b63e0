"""AMX's kernels where there is no AMX: the tests of bfloat16 with a library in which plain C++ stands for its tile unit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from native_cases import LIBRARY

BACKEND: Final = Path(__file__).parent.parent
CMAKE: Final = shutil.which(
    "cmake", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
)

pytestmark = [
    pytest.mark.skipif(CMAKE is None, reason="building the emulated library needs cmake"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulated library is built as on Linux"),
    pytest.mark.skipif(
        "avx512_bf16" not in LIBRARY.instruction_sets(),
        reason="AMX's kernels need AVX512_BF16 beside the tiles",
    ),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the emulated set and the one it builds upon."""
    folder = tmp_path_factory.mktemp("emulated")
    configure = [str(CMAKE), "-S", str(BACKEND), "-B", str(folder), "-DTORCHHAL_EMULATE_AMX=ON"]
    configure += ["-DTORCHHAL_INSTRUCTION_SETS=avx512_bf16;amx_bf16", "-DCMAKE_BUILD_TYPE=", "-DTORCHHAL_OPTIMIZATION=-O1"]  # fmt: skip
    for command in (configure, [str(CMAKE), "--build", str(folder), "--parallel", str(os.cpu_count())]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "_native.so"


@pytest.mark.parametrize(
    ("file", "chosen", "at_least"),
    [
        pytest.param("test_native.py", "amx_bf16 and bfloat16", 100, id="dense"),
        pytest.param("test_flex.py", "packed_sequences_are or pages_are", 2, id="ragged"),
    ],
)
def test_what_bfloat16_promises_holds_on_tiles(
    emulated: Path, tmp_path: Path, file: str, chosen: str, at_least: int
) -> None:
    """In a process of its own: operators are registered with torch once. One bug each would show: a tile's padding that
    is not zero, an edge of keys or columns that is stored too far, a panel that meets another's weights.
    """
    environment = {
        **os.environ,
        "TORCHHAL_CPU_X86_LIBRARY": str(emulated),
        "TORCHHAL_CPU_X86_ISA": "amx_bf16",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    options = ["-q", "-p", "no:cacheprovider", "-k", chosen, str(Path(__file__).with_name(file))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.strip().splitlines()[-1]
    assert " skipped" not in summary and int(summary.split(" passed")[0].split()[-1]) >= at_least
