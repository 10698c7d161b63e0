"""Optional Intel packages, found through their metadata alone and never imported here.

Importing to find out is unsafe: ``intel_extension_for_pytorch`` ends in an AttributeError next to a torch it
was not built for, and both legacy packages are no longer maintained. Native ``torch.xpu`` and the ``xccl``
process group are the main path; neither package is ever required.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Final

from packaging.version import InvalidVersion, Version

LEGACY: Final = {
    "intel-extension-for-pytorch": "replaced by torch.xpu; its last release is for torch 2.8",
    "oneccl-bind-pt": "replaced by the xccl process group; its last release is for torch 2.8",
}
"""Distribution and why it is legacy. Each works only with the torch release of its own major and minor number."""

TRITON: Final = ("triton-xpu", "pytorch-triton-xpu", "triton")
"""Distributions that install the same ``triton`` folder: with two of them present, files of both are mixed."""


@dataclass(frozen=True)
class Provider:
    """A legacy package that is installed, and whether it may be imported."""

    name: str
    version: str
    usable: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}: {self.reason}"


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Version of each distribution of ``names`` that is installed, read from its metadata."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def legacy_providers(torch_version: str, versions: Mapping[str, str]) -> tuple[Provider, ...]:
    """The verdict on each installed legacy package next to ``torch_version``."""
    return tuple(_judge(name, versions[name], torch_version) for name in LEGACY if name in versions)


def _judge(name: str, version: str, torch_version: str) -> Provider:
    try:
        own = Version(version)
    except InvalidVersion:
        return Provider(
            name, version, False, f"its version is not readable, so it is not used; {LEGACY[name]}"
        )
    needed = f"{own.major}.{own.minor}"
    installed_torch = Version(torch_version)
    if (own.major, own.minor) != (installed_torch.major, installed_torch.minor):
        return Provider(
            name,
            version,
            False,
            f"needs torch {needed}.*, and torch {torch_version} is installed; {LEGACY[name]}",
        )
    return Provider(name, version, True, f"matches torch {torch_version}; {LEGACY[name]}")
