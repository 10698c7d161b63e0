"""What is installed: every backend with its claims, every plugin that could not be loaded, and why."""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

import torch

from torchhal._text import dtype_name
from torchhal.hookspecs import FAMILIES
from torchhal.problems import SPEC_VERSION
from torchhal.registry import REFERENCE, Backend, LoadFailure, registry

CEILINGS: Final = {
    "fma_gflops": "GFLOP/s of float32 multiply-add over all of torch's threads, or of the device",
    "read_gbps": "GB/s (1e9 bytes) read from memory",
}
"""Keys a backend's probe may use for the machine's own limits; a number, or a function without arguments that
measures one. ``torchhal doctor`` and ``torchhal bench`` read them."""


@dataclass(frozen=True)
class Installed:
    """One loaded backend, as it describes itself; nothing here has touched the hardware."""

    name: str
    vendor: str
    distribution: str
    version: str
    spec: str
    """Range of specification versions it was written for."""
    device_types: tuple[str, ...]
    """torch device types it computes on; empty for any."""
    preference: Mapping[str, int]
    """Its claim on each device type when nobody chose; ``*`` where it has none of its own for a type."""
    claims: Mapping[str, Mapping[str, Any]]
    """By family: the names of claimed features under ``features``, and each claimed set under its own name."""

    def __str__(self) -> str:
        devices = ", ".join(self.device_types) or "any device"
        origin = f"{self.distribution} {self.version}".strip()
        lines = [f"{self.name} ({origin}; {self.vendor}) on {devices}"]
        return "\n".join(
            lines + [f"  {family}: {_claims_text(claims)}" for family, claims in self.claims.items()]
        )


@dataclass(frozen=True)
class Inventory:
    """Installed backends, strongest claim first, and the plugins that failed to load."""

    backends: tuple[Installed, ...]
    failures: tuple[LoadFailure, ...]
    excluded: tuple[str, ...]
    """Installed entry points that ``TORCHHAL_PLUGINS`` leaves out."""

    def __getitem__(self, name: str) -> Installed:
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise KeyError(
            f"no loaded backend is called {name!r}; loaded: {', '.join(b.name for b in self.backends)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, for JSON."""
        return {
            "specification": SPEC_VERSION,
            "backends": [dataclasses.asdict(b) for b in self.backends],
            "failures": [dataclasses.asdict(f) for f in self.failures],
            "excluded": list(self.excluded),
        }

    def to_json(self) -> str:
        """The inventory as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [str(backend) for backend in self.backends]
        lines += [str(failure) for failure in self.failures]
        lines += [f"{name} is left out by TORCHHAL_PLUGINS" for name in self.excluded]
        return "\n".join(lines)


def backends() -> Inventory:
    """The backends this process can use and the plugins it could not load.

    Loads the installed plugins if that has not happened yet, and looks at no hardware; ``torchhal doctor`` does.
    """
    found = registry()
    installed = sorted((describe(b) for b in found.backends.values()), key=_strength, reverse=True)
    return Inventory(tuple(installed), tuple(found.failures.values()), found.excluded)


def describe(backend: Backend) -> Installed:
    """What a loaded plugin says of itself."""
    info = backend.info
    return Installed(
        name=info.name,
        vendor=info.vendor,
        distribution=backend.distribution,
        version=backend.version or _version(backend.distribution),
        spec=info.spec,
        device_types=tuple(sorted(info.device_types)),
        preference={kind: backend.preference(kind) for kind in sorted(info.device_types) or ["*"]},
        claims={
            f: _claims(getattr(info.capabilities, f))
            for f in FAMILIES
            if getattr(info.capabilities, f) is not None
        },
    )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _claims(claims: Any) -> dict[str, Any]:
    values = {item.name: getattr(claims, item.name) for item in dataclasses.fields(claims)}
    sets = {
        name: sorted(map(_name, value))
        for name, value in values.items()
        if isinstance(value, (set, frozenset))
    }
    return {**sets, "features": [name for name, value in values.items() if value is True]}


def _name(value: Any) -> str:
    return dtype_name(value) if isinstance(value, torch.dtype) else str(value)


def _claims_text(claims: Mapping[str, Any]) -> str:
    return "; ".join(", ".join(values) for values in claims.values() if values) or "nothing"


def _strength(backend: Installed) -> tuple[bool, int]:
    return backend.name != REFERENCE, max(backend.preference.values())


# ---------------------------------------------------------------------------- hardware


@dataclass(frozen=True)
class Probe:
    """What one backend found when it looked at the hardware."""

    backend: str
    findings: Mapping[str, Any]
    """What the probe returned, functions replaced by what they measured; empty if it raised."""
    error: str = ""
    """What the probe raised, though it must not."""
    details: str = ""
    """The traceback of that error."""

    @property
    def status(self) -> str:
        """``ready``, or why the backend can not be used on this machine."""
        return (
            f"probe raised {self.error}" if self.error else str(self.findings.get("status", "gave no status"))
        )


def probe(backend: Backend) -> Probe:
    """Let a backend look at the hardware; may take seconds, and never raises."""
    try:
        found = backend.info.probe()
        return Probe(backend.name, {str(key): measured(value) for key, value in found.items()})
    except Exception as error:  # a plugin's fault is a finding here
        return Probe(backend.name, {}, f"{type(error).__name__}: {error}", traceback.format_exc())


def measured(value: Any) -> Any:
    """``value`` with functions called, in a form JSON can hold; a function that raises gives its error as text."""
    if callable(value) and not isinstance(value, type):
        try:
            return measured(value())
        except Exception as error:
            return f"could not be measured: {type(error).__name__}: {error}"
    if isinstance(value, Mapping):
        return {str(key): measured(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [measured(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else _name(value)
