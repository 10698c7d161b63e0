"""What a compiled artifact depends on, in three classes: identity, capability and tuning.

Identity has to be equal. Capability of the machine that loads has to include that of the machine that made
the artifact. Tuning may differ: the artifact is right, and its measured choices may not be the fastest.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from torchhal.registry import REFERENCE, registry


@dataclass(frozen=True)
class Fingerprint:
    """An environment, as far as compiled artifacts depend on it."""

    identity: Mapping[str, str] = field(default_factory=dict)
    """Fields that have to be equal; one that only one side has counts as a difference."""
    capability: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Sets of features, sorted; the loading side needs all those of the making side."""
    tuning: Mapping[str, str] = field(default_factory=dict)
    """Fields whose difference is reported and nothing else."""

    @property
    def digest(self) -> str:
        """SHA-256 of identity and capability, hexadecimal."""
        strong = [dict(self.identity), {k: list(v) for k, v in self.capability.items()}]
        return hashlib.sha256(json.dumps(strong, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, for JSON."""
        capability = {k: list(v) for k, v in self.capability.items()}
        return {"identity": dict(self.identity), "capability": capability, "tuning": dict(self.tuning)}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Fingerprint:
        """The inverse of :meth:`to_dict`; raises ValueError, KeyError or TypeError for anything else."""
        unknown = sorted(set(content) - {"identity", "capability", "tuning"})
        if unknown:
            raise ValueError(f"unknown classes of fingerprint fields: {', '.join(unknown)}")
        capability = {str(k): tuple(map(str, v)) for k, v in content["capability"].items()}
        return Fingerprint(_strings(content["identity"]), capability, _strings(content["tuning"]))


def _strings(values: Mapping[str, Any]) -> dict[str, str]:
    return {str(k): str(v) for k, v in values.items()}


@dataclass(frozen=True)
class Difference:
    """One field in which two environments differ."""

    kind: str
    """``identity``, ``capability`` or ``tuning``."""
    field: str
    made: str
    """Value where the artifact was made; for a capability, the features missing here."""
    here: str

    @property
    def refuses(self) -> bool:
        """Whether an artifact may not cross this difference."""
        return self.kind != "tuning"

    def __str__(self) -> str:
        if self.kind == "capability":
            return f"capability: {self.field} of this machine lacks {self.made}"
        end = "" if self.refuses else " (reported only: measured choices may not be the fastest here)"
        return f"{self.kind}: {self.field} was {self.made!r} and is {self.here!r} here{end}"


def explain(made: Fingerprint, here: Fingerprint) -> list[Difference]:
    """What keeps an artifact made under one fingerprint from serving, or serving best, under another."""
    found = _different("identity", made.identity, here.identity)
    for name, wanted in made.capability.items():
        missing = sorted(set(wanted) - set(here.capability.get(name, ())))
        if missing:
            found.append(
                Difference("capability", name, ", ".join(missing), ", ".join(here.capability.get(name, ())))
            )
    return found + _different("tuning", made.tuning, here.tuning)


def _different(kind: str, made: Mapping[str, str], here: Mapping[str, str]) -> list[Difference]:
    names = sorted({*made, *here})
    pairs = [(name, made.get(name, "absent"), here.get(name, "absent")) for name in names]
    return [Difference(kind, name, before, now) for name, before, now in pairs if before != now]


# ---------------------------------------------------------------------------- this environment


def fingerprint() -> Fingerprint:
    """The fingerprint of this process."""
    return Fingerprint(
        identity={**_versions(), **_platform(), **_devices()},
        capability={"cpu": _cpu_features()},
        tuning=_tuning(),
    )


def _versions() -> dict[str, str]:
    # torch.version has one attribute for each toolkit torch can be built with, None where it was not.
    build = {
        k: v for k, v in vars(torch.version).items() if not k.startswith("_") and isinstance(v, (str, bool))
    }
    return {
        "torch": torch.__version__,
        "torch build": ", ".join(f"{k}={v}" for k, v in sorted(build.items())),
        "triton": _version("triton"),
        "python": f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor} {sys.implementation.cache_tag}",
        "torchhal": _version("torchhal"),
        "backends": _backends(),
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _backends() -> str:
    loaded = sorted((b.name, b.version) for b in registry().backends.values() if b.name != REFERENCE)
    return ", ".join(f"{name} {version}".strip() for name, version in loaded) or "none"


def _platform() -> dict[str, str]:
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "byte order": sys.byteorder,
        "libc": platform.libc_ver()[0] or "unknown",
        "cpu vectors": _cpu_vectors(),
    }


def _cpu_vectors() -> str:
    """What generated C++ is specialised to.

    Its loops step by the vector length of the machine that generated them, and upstream's keys do not say which
    that was, so it has to be equal even on a larger machine.
    """
    from torch._inductor import config

    simdlen = config.cpp.simdlen
    level = torch.backends.cpu.get_cpu_capability()
    return level if simdlen is None else f"{level} simdlen={simdlen}"


def _devices() -> dict[str, str]:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return {"devices": "cpu"}
    module: Any = torch.get_device_module(accelerator.type)
    return {"devices": ", ".join(sorted({_device(module, i) for i in range(module.device_count())}))}


def _device(module: Any, index: int) -> str:
    properties = module.get_device_properties(index)
    capability = getattr(module, "get_device_capability", lambda _: "")(index)
    suffix = f" {capability[0]}.{capability[1]}" if isinstance(capability, tuple) else ""
    return f"{properties.name}{suffix}"


def _cpu_capabilities() -> Mapping[str, Any]:
    read = getattr(torch.cpu, "get_capabilities", None)
    return {} if read is None else read()


def _cpu_features() -> tuple[str, ...]:
    return tuple(sorted(name for name, value in _cpu_capabilities().items() if value is True))


def _tuning() -> dict[str, str]:
    sizes = {name: value for name, value in _cpu_capabilities().items() if not isinstance(value, bool)}
    accelerator = torch.accelerator.current_accelerator()
    return {
        "cpu": ", ".join(f"{name}={value}" for name, value in sorted(sizes.items())) or platform.processor(),
        "threads": str(torch.get_num_threads()),
        "libc version": platform.libc_ver()[1],
        "device count": str(0 if accelerator is None else torch.accelerator.device_count()),
    }
