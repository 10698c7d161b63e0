"""Which GPUs, driver and torch build this machine has, and why they are not suitable if they are not.

:func:`observe` looks; :func:`unsuitable` judges what was seen, as a pure function of a frozen record, so
that every verdict can be tested on a machine without a GPU. :mod:`torchhal_cuda128.doctor` says how to mend it.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Final

import torch

from torchhal.problems import Decline
from torchhal_cuda128.releases import dotted, release

MINIMUM_CUDA: Final = (12, 8)
"""The first CUDA release that generates code for compute capability 10.0 and 12.0."""

FAMILIES: Final = {9: "Hopper", 10: "Blackwell", 12: "Blackwell"}
"""Compute capability majors this backend knows. 10 (data centre) has tensor memory and 228 KB of shared memory
on each multiprocessor; 12 (workstation and consumer) has neither tensor memory nor more than 99 KB a block,
so the two are told apart by the major number and never by "at least 10"."""


@dataclass(frozen=True)
class Device:
    """One GPU as torch sees it."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int = 0
    multiprocessors: int = 0

    @property
    def architecture(self) -> str:
        """Name of the architecture, or ``unknown``."""
        return FAMILIES.get(self.capability[0], "unknown")


@dataclass(frozen=True)
class Hardware:
    """Everything the verdict depends on."""

    torch_version: str
    torch_cuda: tuple[int, int] | None
    """CUDA release torch was built with; None for a build without CUDA."""
    driver_cuda: tuple[int, int] | None
    """Newest CUDA release the installed driver can run; None when no driver library was found."""
    devices: tuple[Device, ...] = ()
    arch_list: tuple[str, ...] = ()
    """What torch's own kernels were compiled for, for example ``sm_90`` or ``compute_120``."""
    error: str = ""
    """What torch raised when it was asked for the devices."""
    system: str = "Linux"
    """``Linux`` or ``Windows``, as :func:`platform.system` has it."""
    machine: str = "x86_64"
    """``x86_64``, ``aarch64``, ``AMD64``: the processor, as :func:`platform.machine` has it."""
    driver: str | None = None
    """Release of the driver, for example ``580.159.04``; None where its management library does not say."""
    triton: str | None = None
    """Installed Triton; None without one."""
    torch_triton: str = ""
    """The Triton that this torch asks for, for example ``==3.6.0``; empty where its metadata names none."""
    fa4: str | None = None
    """Installed FlashAttention-4; None without one."""


def observe() -> Hardware:
    """Look at this machine. Never raises."""
    devices, error = _devices()
    return Hardware(
        torch_version=torch.__version__,
        torch_cuda=None if torch.version.cuda is None else release(torch.version.cuda),
        driver_cuda=_driver_cuda(),
        devices=devices,
        arch_list=tuple(torch.cuda.get_arch_list()) if devices else (),
        error=error,
        system=platform.system(),
        machine=platform.machine(),
        driver=_driver(),
        triton=_installed("triton", "triton-windows"),
        torch_triton=_torch_triton(),
        fa4=_installed("flash-attn-4"),
    )


def unsuitable(hardware: Hardware, index: int | None = None) -> Decline | None:
    """Why device ``index`` (0 when None) can not be used, or None when it can.

    The reasons are given in the order in which a person would have to mend them.
    """
    return _software(hardware) or _device(hardware, index or 0)


def _software(hardware: Hardware) -> Decline | None:
    version, built, driver = hardware.torch_version, hardware.torch_cuda, hardware.driver_cuda
    if built is None:
        return Decline(
            "torch_without_cuda",
            f"torch {version} is built without CUDA; install a build for CUDA 12.8 or later",
        )
    if built < MINIMUM_CUDA:
        return Decline(
            "torch_cuda_too_old",
            f"torch {version} is built for CUDA {dotted(built)}; 12.8 or later is needed",
        )
    if driver is None:
        return Decline("no_driver", "no CUDA driver library is found; install the GPU's driver")
    needed = max(MINIMUM_CUDA, (built[0], 0))
    if driver < needed:
        return Decline(
            "driver_too_old",
            f"the driver runs CUDA up to {dotted(driver)}; {dotted(needed)} or later is needed",
        )
    return None


def _device(hardware: Hardware, index: int) -> Decline | None:
    if not hardware.devices:
        reason = f": {hardware.error}" if hardware.error else ""
        return Decline("no_device", f"the driver is installed and torch sees no CUDA device{reason}")
    if index >= len(hardware.devices):
        return Decline("no_device", f"there is no device cuda:{index}; torch sees {len(hardware.devices)}")
    device = hardware.devices[index]
    found = f"{device.name} has compute capability {dotted(device.capability)}"
    if device.capability < (9, 0):
        return Decline("capability_too_low", f"{found}; 9.0 (Hopper) or 10.x and 12.x (Blackwell) is needed")
    if device.capability[0] not in FAMILIES:
        return Decline(
            "capability_unknown",
            f"{found}, which this backend was not written for; it knows 9.x, 10.x and 12.x",
        )
    if not _compiled_for(device.capability, hardware.arch_list):
        had = ", ".join(hardware.arch_list) or "nothing"
        return Decline(
            "torch_without_arch", f"{found}, and torch {hardware.torch_version} is compiled for {had}"
        )
    return None


def _compiled_for(capability: tuple[int, int], arch_list: tuple[str, ...]) -> bool:
    """Machine code runs on later minors of its major (sm_120 on 12.1); virtual code on anything later."""
    for arch in arch_list:
        kind, _, number = arch.partition("_")
        digits = number.rstrip("af")
        if not digits.isdigit():
            continue
        target = (int(digits[:-1]), int(digits[-1]))
        same_major = target[0] == capability[0]
        if target <= capability and (same_major or kind == "compute"):
            return True
    return False


def _devices() -> tuple[tuple[Device, ...], str]:
    try:
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception as error:  # a broken driver raises whatever it likes, and the reason is what is wanted
        return (), " ".join(str(error).split())
    return tuple(
        Device(p.name, (p.major, p.minor), p.total_memory, p.multi_processor_count) for p in found
    ), ""


def _driver_cuda() -> tuple[int, int] | None:
    """Ask the driver library itself: ``cuDriverGetVersion`` needs no device and no initialisation."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        failed = library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


@functools.cache
def _driver() -> str | None:
    """Ask the driver's management library, which needs no device in use."""
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(80)
        failed = library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, len(text))
    except (OSError, AttributeError):
        return None
    return None if failed else text.value.decode("ascii", "replace")


def _installed(*names: str) -> str | None:
    """Version of the first of some distributions that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def _torch_triton() -> str:
    """The specifier behind ``triton`` in torch's own requirements."""
    try:
        needed = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        needed = []
    found = (re.match(r"triton\s*\(?([=<>~!][^;)]*)", requirement) for requirement in needed)
    return next((match[1].strip() for match in found if match), "")
