"""What ``torchhal doctor`` shows: this machine in words, what is missing on it, and the command that mends that.

Pure functions of a :class:`~torchhal_cuda128.hardware.Hardware`, so that the advice for every system can be tested on any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torchhal.portable import MINIMUM_TRITON
from torchhal_cuda128 import fa4
from torchhal_cuda128.hardware import MINIMUM_CUDA, Hardware, unsuitable
from torchhal_cuda128.releases import dotted, release

LAST_FOR_CUDA_12: Final = "2.11"
"""The last torch with a build for CUDA 12.8; from 2.12 on they are for 12.6 and 13 (pytorch/pytorch#178665)."""
BRANCHES: Final = {12: "570", 13: "580"}
"""The first branch of drivers that runs CUDA 12.8, and 13.0 (CUDA Toolkit release notes, table of driver versions)."""
DRIVERS: Final = "https://www.nvidia.com/drivers"


def describe(hardware: Hardware) -> dict[str, object]:
    """What the backend's probe gives: the record in words, ``status`` first and what to ``mend`` last."""
    verdict = unsuitable(hardware)
    driver, built = hardware.driver_cuda, hardware.torch_cuda
    return {
        "status": str(verdict) if verdict else "ready",
        "system": f"{hardware.system} {hardware.machine}",
        "driver": hardware.driver,
        "driver runs CUDA up to": dotted(driver) if driver else None,
        "torch": hardware.torch_version,
        "torch built for CUDA": dotted(built) if built else None,
        "torch compiled for": list(hardware.arch_list),
        "triton": hardware.triton,
        "flash-attn-4": hardware.fa4,
        "devices": [_describe_device(hardware, i) for i in range(len(hardware.devices))],
        "mend": [found.to_dict() for found in advice(hardware)],
    }


def _describe_device(hardware: Hardware, index: int) -> dict[str, object]:
    device = hardware.devices[index]
    verdict = unsuitable(hardware, index)
    return {
        "name": device.name,
        "status": str(verdict) if verdict else "ready",
        "compute capability": dotted(device.capability),
        "architecture": device.architecture,
        "memory GiB": round(device.memory_bytes / 2**30, 1),
        "multiprocessors": device.multiprocessors,
    }


# ---------------------------------------------------------------------------- what to mend


@dataclass(frozen=True)
class Advice:
    """One thing to mend."""

    code: str
    """As of the Decline that it ends."""
    reason: str
    command: str
    """What to type, or for a driver what to install."""

    def to_dict(self) -> dict[str, str]:
        """As the doctor's ``mend`` lists it."""
        return {"code": self.code, "reason": self.reason, "do": self.command}


def advice(hardware: Hardware) -> tuple[Advice, ...]:
    """What to mend, in that order: what must be before anything runs, then what more could be had."""
    verdicts = [unsuitable(hardware, index) for index in range(max(1, len(hardware.devices)))]
    found = [
        Advice(verdict.code, verdict.reason, command)
        for verdict in verdicts
        if verdict is not None and (command := _command(verdict.code, hardware))
    ]
    if any(verdict is None for verdict in verdicts):
        found += [*_triton(hardware), *_flash_attention(hardware)]
    return tuple(dict.fromkeys(found))


def _command(code: str, hardware: Hardware) -> str:
    """How to mend what makes a device unsuitable; empty for what no command mends."""
    built = hardware.torch_cuda or MINIMUM_CUDA
    if code in ("torch_without_cuda", "torch_cuda_too_old", "torch_without_arch"):
        return torch_command(hardware)
    if code == "no_driver":
        return driver_command(hardware, built[0])
    if code == "driver_too_old":
        other = f"; or keep it: {torch_command(hardware)}" if _runs_12_8(hardware) else ""
        return driver_command(hardware, built[0]) + other
    if code == "no_device":
        return "nvidia-smi  # has to list the GPU; in a container start it with --gpus all"
    return ""


def torch_command(hardware: Hardware) -> str:
    """The command that installs a torch for this driver, whichever of Linux (x86-64 and Arm) and Windows this is.

    By uv, which knows where torch's builds for each CUDA are: pip's own default has none with CUDA for Windows.
    """
    python = _python(hardware)
    install = f"{python} -m pip install -U uv && {python} -m uv pip install --reinstall-package torch"
    if hardware.driver_cuda is None or hardware.driver_cuda >= (13, 0):
        return f"{install} torch --torch-backend=cu130"
    return f'{install} "torch=={LAST_FOR_CUDA_12}.*" --torch-backend=cu128'


def driver_command(hardware: Hardware, major: int) -> str:
    """What driver to install for a CUDA release."""
    branch = BRANCHES.get(major, BRANCHES[max(BRANCHES)])
    system = {"Windows": "Windows", "Linux": f"Linux {hardware.machine}"}.get(
        hardware.system, hardware.system
    )
    return f"install driver {branch} or later for {system} from {DRIVERS}"


def pip(hardware: Hardware) -> str:
    """The pip of the Python that runs, not whichever is found first."""
    return f"{_python(hardware)} -m pip"


def _python(hardware: Hardware) -> str:
    return "py" if hardware.system == "Windows" else "python3"


def _runs_12_8(hardware: Hardware) -> bool:
    return hardware.driver_cuda is not None and hardware.driver_cuda >= MINIMUM_CUDA


# ---------------------------------------------------------------------------- Triton


def _triton(hardware: Hardware) -> Iterator[Advice]:
    found, needed = hardware.triton, dotted(MINIMUM_TRITON)
    names = ", ".join(dict.fromkeys(device.architecture for device in hardware.devices))
    if found is None:
        reason = f"Triton is not installed; the kernels for {names} need {needed} or later"
        yield Advice("triton_missing", reason, _triton_command(hardware))
    elif release(found) < MINIMUM_TRITON:
        reason = f"Triton is {found}; the kernels for {names} need {needed} or later"
        yield Advice("triton_too_old", reason, _triton_command(hardware))


def _triton_command(hardware: Hardware) -> str:
    """The Triton that this torch names as its own; on Windows torch names none, and another distribution has the compiler."""
    if hardware.system == "Windows":
        return f'{pip(hardware)} install -U "triton-windows>={dotted(MINIMUM_TRITON)}"'
    own = hardware.torch_triton
    wanted = own if own and release(own.lstrip("=<>~")) >= MINIMUM_TRITON else f">={dotted(MINIMUM_TRITON)}"
    return f'{pip(hardware)} install --force-reinstall --no-deps "triton{wanted}"'


# ---------------------------------------------------------------------------- FlashAttention-4


def _flash_attention(hardware: Hardware) -> Iterator[Advice]:
    usable = [d for i, d in enumerate(hardware.devices) if unsuitable(hardware, i) is None]
    if hardware.system != "Linux" or not any(d.capability[0] in fa4.FAMILIES for d in usable):
        return
    verdict = fa4.unavailable(hardware.fa4)
    if verdict is not None:
        yield Advice(verdict.code, verdict.reason, f'{pip(hardware)} install -U "{extra(hardware)}"')


def extra(hardware: Hardware) -> str:
    """What installs FlashAttention-4 with the compiler for torch's CUDA."""
    later = hardware.torch_cuda is not None and hardware.torch_cuda[0] >= 13
    return f"torchhal-cuda128[{'fa4-cu13' if later else 'fa4'}]"
