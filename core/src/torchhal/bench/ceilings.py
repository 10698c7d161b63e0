"""The machine's own limits, measured in the same run as the kernels that are held against them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from torchhal.bench.timing import Effort, interleaved, on_device
from torchhal.inventory import CEILINGS, measured
from torchhal.registry import Backend

_SIDE: Final = 1024
_BYTES: Final = 256 << 20
_EFFORT: Final = Effort(repetitions=5, budget=0.5, limit=5.0, most=20)


@dataclass(frozen=True)
class Ceilings:
    """Limits of the device, and who measured them."""

    gflops: float
    """1e9 floating-point operations a second, in multiply-adds (two operations each): float32 on a processor, bfloat16 on an
    accelerator, in whose matrix units attention is computed."""
    gbps: float
    """1e9 bytes a second, read from memory; on an accelerator read and written by a copy."""
    gflops_source: str
    gbps_source: str

    def compute_share(self, flops: float, seconds: float) -> float:
        """Share of the arithmetic limit; above 1 where a type is faster than float32."""
        return flops / seconds / 1e9 / self.gflops

    def read_share(self, size: float, seconds: float) -> float:
        """Share of the memory limit, for ``size`` bytes; above 1 where they come from a cache."""
        return size / seconds / 1e9 / self.gbps

    def to_dict(self) -> dict[str, Any]:
        """Numbers and sources, for JSON."""
        return asdict(self)


def ceilings(device: torch.device, backends: list[Backend]) -> Ceilings:
    """The limits of ``device``: the highest of what backends' probes measure and what torch itself reaches.

    The highest, because what anything reached can not be above the limit.
    """
    if device.type != "cpu":
        arithmetic, copying = _accelerator_gflops(device), _copy_gbps(device)
        return Ceilings(arithmetic, copying, "torch matmul, bfloat16", "torch copy of 1 GiB, both ways")
    offered = [(f"probe of {b.name}", _offered(b)) for b in backends if device.type in b.info.device_types]
    gflops, gflops_source = _highest(offered, "fma_gflops", (_matmul_gflops(device), "torch matmul, float32"))
    gbps, gbps_source = _highest(offered, "read_gbps", (_sum_gbps(device), "torch sum over 256 MiB"))
    return Ceilings(gflops, gbps, gflops_source, gbps_source)


def _offered(backend: Backend) -> Mapping[str, Any]:
    try:
        found = backend.info.probe()
    except Exception:  # the doctor's business; here it offers nothing
        return {}
    return {key: measured(found[key]) for key in CEILINGS if key in found}


def _highest(
    offered: list[tuple[str, Mapping[str, Any]]], key: str, own: tuple[float, str]
) -> tuple[float, str]:
    return max(
        [own, *((float(values[key]), source) for source, values in offered if _is_limit(values.get(key)))]
    )


def _is_limit(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _matmul_gflops(device: torch.device) -> float:
    a, b = (torch.randn(_SIDE, _SIDE, device=device) for _ in range(2))
    timing = interleaved({"matmul": lambda: torch.mm(a, b)}, _EFFORT)["matmul"]
    return 2 * _SIDE**3 / timing.best / 1e9


def _accelerator_gflops(device: torch.device) -> float:
    side = 8 * _SIDE
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    timing = on_device({"matmul": lambda: torch.mm(a, b)}, _EFFORT, device)["matmul"]
    return 2 * side**3 / timing.median / 1e9


def _copy_gbps(device: torch.device) -> float:
    source = torch.ones(1 << 28, device=device)
    target = torch.empty_like(source)
    timing = on_device({"copy": lambda: target.copy_(source)}, _EFFORT, device)["copy"]
    return 2 * 4 * source.numel() / timing.median / 1e9


def _sum_gbps(device: torch.device) -> float:
    data = torch.ones(_BYTES // 4, device=device)
    timing = interleaved({"sum": data.sum}, _EFFORT)["sum"]
    return _BYTES / timing.best / 1e9
