"""Deployment: compile options, a quantizer, ahead-of-time packages and profiler activities for a device."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.problems import AttentionProblem, DeployProblem
from torchhal.registry import registry
from torchhal.selection import select

__all__ = ["compile_options", "load", "package", "profiler_activities", "quantizer"]

Device = torch.device | str


def compile_options(device: Device, *, backend: str | None = None) -> dict[str, object]:
    """Options for ``torch.compile(model, options=...)`` that suit ``device``.

    An empty dictionary means that torch's own defaults are the best known.

    Raises:
        InvalidProblem: ``device`` is no torch device.
        Unsupported: no backend the policy allows advises on this device.
    """
    options: dict[str, object] = _plan("compile_options", device, backend)()
    return options


def quantizer(device: Device, *, backend: str | None = None) -> Any:
    """A PT2E quantizer for ``device``, configured, for ``torchao.quantization.pt2e.quantize_pt2e.prepare_pt2e``.

    Raises:
        InvalidProblem: ``device`` is no torch device.
        Unsupported: no backend has one; says which distribution to install where one is missing.
    """
    return _plan("quantizer", device, backend)()


def package(
    exported_program: torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    *,
    backend: str | None = None,
) -> Path:
    """Compile an exported program ahead of time into one file that runs without Python code of the model.

    Calls of torchhal inside the program are operators whose backend was chosen at export; the process that
    loads the package needs that backend installed.

    Args:
        exported_program: result of ``torch.export.export``; the device is that of its tensors.
        path: file to write, ending in ``.pt2``; its directory has to exist.
        backend: name of the backend to ask.

    Returns:
        ``path``, absolute.

    Raises:
        InvalidProblem: the program or the path is not of that form.
        Unsupported: no backend the policy allows packages for the device.
    """
    if not isinstance(exported_program, torch.export.ExportedProgram):
        raise InvalidProblem(
            f"package() expects an ExportedProgram and got {type(exported_program).__name__}; "
            f"make one with torch.export.export(model, example_inputs)"
        )
    target = Path(path).absolute()
    if target.suffix != ".pt2" or not target.parent.is_dir():
        raise InvalidProblem(
            f"package() expects the path of a .pt2 file in a directory that exists and got {os.fspath(path)!r}"
        )
    written = _plan("package", _device_of(exported_program), backend)(exported_program, target)
    return Path(written).absolute()


def load(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """The model in a package that :func:`package` wrote, as a function of the exported model's arguments.

    **Only load packages you trust**: a package is native code, and loading runs it.

    Raises:
        InvalidProblem: there is no file at ``path``, or it is no package.
    """
    target = Path(path)
    if not target.is_file():
        raise InvalidProblem(
            f"there is no package at {os.fspath(path)!r}; torchhal.deploy.package(exported_program, path) writes one"
        )
    if not zipfile.is_zipfile(target):
        raise InvalidProblem(
            f"{os.fspath(path)!r} is no package, or a damaged one: a .pt2 package is a zip archive and this file is not"
        )
    from torch._inductor import aoti_load_package

    import torchhal.ops_families  # noqa: F401  # the operators a package may call

    for (
        backend
    ) in registry().backends.values():  # and those that backends bring, registered by their first answer
        backend.ask(AttentionProblem(device=torch.device("cpu")))

    model: Callable[..., Any] = aoti_load_package(os.fspath(target))
    return model


def profiler_activities(
    device: Device, *, backend: str | None = None
) -> list[torch.profiler.ProfilerActivity]:
    """Activities for ``torch.profiler.profile(activities=...)`` that show work on ``device`` and on the CPU.

    Raises:
        InvalidProblem: ``device`` is no torch device.
        Unsupported: this torch can not profile the device, and no backend can.
    """
    activities: list[torch.profiler.ProfilerActivity] = _plan("profiler", device, backend)()
    return activities


# ---------------------------------------------------------------------------- parts


def _plan(task: str, device: Device, backend: str | None) -> Callable[..., Any]:
    selected = select(DeployProblem(device=_checked(device), task=task), backend)
    selected.record()
    assert selected.plan is not None, selected
    return selected.plan.run


def _checked(device: Device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidProblem(f"expected a torch device, such as 'cpu', and got {device!r}") from error


def _device_of(program: torch.export.ExportedProgram) -> torch.device:
    """Where the program computes: the accelerator, if any of its tensors is on one."""
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    devices = sorted(
        {v.device for v in values if isinstance(v, Tensor)}, key=lambda d: (d.type == "cpu", str(d))
    )
    return devices[0] if devices else torch.device("cpu")
