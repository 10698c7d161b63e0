"""The selection lock file: choices measured by ``torchhal tune``, honoured while their environment holds."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchhal.errors import ConfigurationError
from torchhal.problems import SPEC_VERSION, Problem
from torchhal.registry import Registry

FORMAT = 1


@dataclass(frozen=True)
class Lock:
    """A lock file as read, and why it is not used if it is not."""

    path: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By problem text: ``backend``, the ``variant`` of its plan where it has some, and the seconds measured for each."""
    stale: str = ""
    """What differs between the environment the file was measured in and this one; empty when it holds."""

    def backend_for(self, problem: Problem) -> str | None:
        """The measured choice for ``problem``, None without one or when the file is stale."""
        if self.stale:
            return None
        entry = self.entries.get(problem.text)
        return None if entry is None else str(entry["backend"])

    def variant_for(self, problem: Problem) -> str | None:
        """Which variant of that backend's plan was fastest; None for the plan as it is."""
        variant = self.entries.get(problem.text, {}).get("variant")
        return None if variant is None else str(variant)


def default_path() -> Path | None:
    """Where the lock file lives: ``TORCHHAL_LOCK``, or the user's configuration directory; None if switched off."""
    value = os.environ.get("TORCHHAL_LOCK")
    if value is not None:
        return Path(value) if value else None
    import platformdirs

    return Path(platformdirs.user_config_dir("torchhal")) / "selection.lock.json"


def environment_stamp(registry: Registry) -> dict[str, str]:
    """What a measurement depends on: versions, machine and devices. Another value of any makes a lock stale."""
    stamp = {
        "specification": SPEC_VERSION,
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()} {_processor()}",
        "threads": str(torch.get_num_threads()),
        "accelerators": ", ".join(_accelerators()) or "none",
    }
    stamp.update({f"backend {name}": b.version for name, b in sorted(registry.backends.items())})
    return stamp


def read(registry: Registry, path: Path | None = None) -> Lock | None:
    """The lock file at ``path`` (default :func:`default_path`), or None where there is none.

    Raises:
        ConfigurationError: the file exists and is not a lock file of a format this version reads.
    """
    path = path or default_path()
    if path is None or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        environment, entries = dict(content["environment"]), dict(content["entries"])
        for entry in entries.values():
            str(entry["backend"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = "run `torchhal tune` to write it again, or delete it"
        raise ConfigurationError(f"{path} is not a selection lock file ({error}); {advice}") from error
    return Lock(path, environment, entries, _difference(environment, environment_stamp(registry)))


def write(registry: Registry, entries: Mapping[str, Mapping[str, Any]], path: Path) -> Lock:
    """Replace the lock file at ``path`` by ``entries``, stamped with this environment, in one atomic step."""
    environment = environment_stamp(registry)
    content = {"format": FORMAT, "environment": environment, "entries": dict(entries)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
    ) as file:
        json.dump(content, file, indent=2, sort_keys=True)
    os.replace(file.name, path)
    return Lock(path, environment, dict(entries))


def _difference(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    changed = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
    return "; ".join(
        f"{key} was {then.get(key, 'absent')!r}, is {now.get(key, 'absent')!r}" for key in changed
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _accelerators() -> list[str]:
    kind = torch.accelerator.current_accelerator()
    if kind is None or not torch.accelerator.is_available():
        return []
    module = torch.get_device_module(kind)
    return [str(module.get_device_name(i)) for i in range(torch.accelerator.device_count())]
