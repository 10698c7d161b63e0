"""Says whether this machine has what a backend's tests need: ``python tools/hardware.py cuda128``.

Prints ``ready`` and exits with 0, or ``not run: <reason>`` and exits with 77. It uses the standard library
alone, so that the answer comes before anything is installed.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Final

NOT_RUN: Final = 77
"""Exit status for "can not be run here", as in automake and meson."""


def cpu_x86() -> str | None:
    """Why the cpu_x86 backend can not run its kernels on this machine, or None."""
    machine = platform.machine()
    if machine.lower() not in ("x86_64", "amd64"):
        return f"the processor is {machine}, and x86-64 is needed"
    if sys.platform == "linux" and not {"avx2", "fma", "f16c"} <= _linux_cpu_flags():
        return "the processor lacks AVX2, FMA or F16C"
    return None


def _linux_cpu_flags() -> set[str]:
    with open("/proc/cpuinfo") as lines:
        return set(next((line for line in lines if line.startswith("flags")), "").split())


def cuda128() -> str | None:
    """Why the cuda128 backend has no GPU here, or None."""
    library = _open("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    if library is None:
        return "no CUDA driver is installed"
    version, count = ctypes.c_int(), ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) or version.value < 12080:
        return f"the driver runs CUDA up to {version.value // 1000}.{version.value % 1000 // 10}, and 12.8 is needed"
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return "the CUDA driver sees no device"
    major = ctypes.c_int()
    compute_capability_major = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    library.cuDeviceGetAttribute(ctypes.byref(major), compute_capability_major, 0)
    if major.value < 9:
        return f"device 0 has compute capability {major.value}.x, and 9.0 is needed"
    return None


def xpu() -> str | None:
    """Why the xpu backend has no GPU here, or None."""
    library = _open("ze_loader.dll" if sys.platform == "win32" else "libze_loader.so.1")
    if library is None:
        return "no Level Zero loader is installed"
    gpu_only, count = 1, ctypes.c_uint32()
    if library.zeInit(gpu_only) or library.zeDriverGet(ctypes.byref(count), None) or count.value == 0:
        return "Level Zero sees no GPU driver"
    return None


def _open(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


CHECKS: Final[Mapping[str, Callable[[], str | None]]] = {"cpu_x86": cpu_x86, "cuda128": cuda128, "xpu": xpu}


def missing(backend: str) -> str | None:
    """Why the tests of ``backend`` that need its hardware can not run on this machine, or None."""
    return CHECKS[backend]()


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in CHECKS:
        print(f"expected one of {', '.join(CHECKS)}, and got {' '.join(arguments) or 'nothing'}")
        return 2
    reason = missing(arguments[0])
    print(f"not run: {reason}" if reason else "ready")
    return NOT_RUN if reason else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
