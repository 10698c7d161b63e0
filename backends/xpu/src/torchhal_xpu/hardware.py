"""Which Intel GPUs, driver and torch build this machine has, and why they are not suitable if they are not.

:func:`observe` looks; :func:`unsuitable` and :func:`cannot_compile` judge what was seen, as pure functions of a
frozen record, so that every verdict can be tested on a machine without a GPU.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from torchhal.problems import Decline
from torchhal_xpu.providers import LEGACY, TRITON, Provider, installed, legacy_providers

LEVEL_ZERO: Final = "ze_loader.dll" if sys.platform == "win32" else "libze_loader.so.1"


@dataclass(frozen=True)
class Device:
    """One GPU as torch sees it; the traits decide which kernels can run."""

    name: str
    driver: str = ""
    memory_bytes: int = 0
    execution_units: int = 0
    sub_group_sizes: tuple[int, ...] = ()
    matrix_units: bool = False
    """Systolic matrix units (DPAS): present on Arc A and B and Core Ultra 200V, absent on Core Ultra 100H."""
    float64: bool = False
    bfloat16: bool = False


@dataclass(frozen=True)
class Hardware:
    """Everything the verdicts depend on."""

    torch_version: str
    platform: str
    torch_sycl: str | None
    """SYCL release torch was built with, as torch states it; None for a build without XPU."""
    level_zero: bool = False
    """Whether the driver's loader library can be opened."""
    devices: tuple[Device, ...] = ()
    xccl: bool = False
    """Whether torch has the ``xccl`` process group."""
    triton: Mapping[str, str] = field(default_factory=dict)
    """Installed Triton distributions and their versions."""
    level_zero_sdk: bool = False
    """Whether ``LEVEL_ZERO_V1_SDK_PATH`` is set; compiling on Windows needs it."""
    legacy: tuple[Provider, ...] = ()
    error: str = ""


def observe() -> Hardware:
    """Look at this machine. Never raises."""
    devices, error = _devices()
    return Hardware(
        torch_version=torch.__version__,
        platform=sys.platform,
        torch_sycl=getattr(torch.version, "xpu", None),
        level_zero=_can_open(LEVEL_ZERO),
        devices=devices,
        xccl=torch.distributed.is_available() and torch.distributed.is_xccl_available(),
        triton=installed(TRITON),
        level_zero_sdk="LEVEL_ZERO_V1_SDK_PATH" in os.environ,
        legacy=legacy_providers(torch.__version__, installed(tuple(LEGACY))),
        error=error,
    )


def unsuitable(hardware: Hardware, index: int | None = None) -> Decline | None:
    """Why device ``index`` (0 when None) can not be used, or None when it can."""
    if hardware.platform not in ("linux", "win32"):
        return Decline(
            "other_platform", f"Intel GPUs are served on Linux and Windows, and this is {hardware.platform}"
        )
    if hardware.torch_sycl is None:
        return Decline(
            "torch_without_xpu",
            f"torch {hardware.torch_version} is built without XPU; install torch's XPU build, as its site describes for Intel GPUs",
        )
    if not hardware.level_zero:
        return Decline(
            "no_driver", f"the Level Zero loader {LEVEL_ZERO} is not found; install the GPU's driver"
        )
    if not hardware.devices:
        reason = f": {hardware.error}" if hardware.error else ""
        return Decline("no_device", f"the driver is installed and torch sees no XPU device{reason}")
    if (index or 0) >= len(hardware.devices):
        return Decline("no_device", f"there is no device xpu:{index}; torch sees {len(hardware.devices)}")
    return None


def cannot_compile(hardware: Hardware) -> Decline | None:
    """Why torch.compile can not make kernels for this machine, or None when it can."""
    present = [f"{name} {version}" for name, version in hardware.triton.items()]
    if len(present) > 1:
        return Decline(
            "triton_conflict",
            f"{' and '.join(present)} install the same folder; uninstall them all and install triton-xpu",
        )
    if not present or "triton" in hardware.triton:
        found = f"; {present[0]} has no Intel GPU backend" if present else ""
        return Decline(
            "no_triton", f"compiling needs the distribution triton-xpu that belongs to this torch{found}"
        )
    if hardware.platform == "win32" and not hardware.level_zero_sdk:
        return Decline(
            "no_level_zero_sdk", "compiling on Windows needs LEVEL_ZERO_V1_SDK_PATH set to the Level Zero SDK"
        )
    return None


def _devices() -> tuple[tuple[Device, ...], str]:
    try:
        found = [torch.xpu.get_device_properties(i) for i in range(torch.xpu.device_count())]
        return tuple(_device(properties) for properties in found), ""
    except Exception as error:  # a broken driver raises whatever it likes, and the reason is what is wanted
        return (), " ".join(str(error).split())


def _device(properties: Any) -> Device:
    return Device(
        name=properties.name,
        driver=str(getattr(properties, "driver_version", "")),
        memory_bytes=properties.total_memory,
        execution_units=getattr(properties, "gpu_eu_count", 0),
        sub_group_sizes=tuple(getattr(properties, "sub_group_sizes", ())),
        matrix_units=bool(getattr(properties, "has_subgroup_matrix_multiply_accumulate", False)),
        float64=bool(getattr(properties, "has_fp64", False)),
        bfloat16=bool(getattr(properties, "has_bfloat16_conversions", False)),
    )


def _can_open(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def describe(hardware: Hardware) -> dict[str, object]:
    """What ``torchhal doctor`` shows: the record in words, with ``status`` first."""
    verdict = unsuitable(hardware)
    compiling = verdict or cannot_compile(hardware)
    return {
        "status": str(verdict) if verdict else "ready",
        "torch": hardware.torch_version,
        "torch built with SYCL": hardware.torch_sycl,
        "level zero loader": hardware.level_zero,
        "xccl process group": hardware.xccl,
        "compiling": str(compiling) if compiling else "ready",
        "triton": dict(hardware.triton),
        "legacy providers": [str(provider) for provider in hardware.legacy],
        "devices": [_describe_device(device) for device in hardware.devices],
    }


def _describe_device(device: Device) -> dict[str, object]:
    return {
        "name": device.name,
        "driver": device.driver,
        "memory GiB": round(device.memory_bytes / 2**30, 1),
        "execution units": device.execution_units,
        "matrix units": device.matrix_units,
        "float64": device.float64,
        "bfloat16": device.bfloat16,
    }
