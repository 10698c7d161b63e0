"""Finds backends through entry points, verifies them against the specification, and keeps what failed."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

import pluggy

from torchhal import hookspecs
from torchhal._identity import field_fault
from torchhal.errors import BackendLoadError, BackendNotFound, InvalidProblem
from torchhal.problems import SPEC_VERSION, BackendInfo, Decline, Plan, Problem

ENTRY_POINT_GROUP: Final = "torchhal.backends"
REFERENCE: Final = "reference"
DEFAULT_PREFERENCE: Final = 100
"""Claim of a backend that declares none: above the reference, equal to its undeclared peers."""


@dataclass(frozen=True)
class LoadFailure:
    """A plugin that is installed and could not be loaded, and why."""

    name: str
    distribution: str
    stage: str
    """``import``, ``verify`` (against the specification), ``identity`` or ``version``."""
    reason: str
    details: str = ""
    """The traceback, for ``torchhal doctor --json``."""

    def __str__(self) -> str:
        return f"{self.name} (from {self.distribution}) failed to load in stage '{self.stage}': {self.reason}"


@dataclass(frozen=True)
class Backend:
    """A loaded plugin and what it says of itself."""

    info: BackendInfo
    distribution: str
    version: str
    plugin: Any
    manager: pluggy.PluginManager

    @property
    def name(self) -> str:
        return self.info.name

    def serves(self, problem: Problem) -> bool:
        """Whether the backend claims the problem's family and its type of device."""
        claims_family = getattr(self.info.capabilities, problem.family) is not None
        return claims_family and (not self.info.device_types or problem.device.type in self.info.device_types)

    def preference(self, device_type: str) -> int:
        """The backend's own claim on a type of device."""
        default = 0 if self.name == REFERENCE else DEFAULT_PREFERENCE
        return self.info.preference.get(device_type, default)

    def ask(self, problem: Problem) -> Plan | Decline:
        """The backend's answer to one problem; claims first, so that what is not claimed is never asked."""
        if self.info.device_types and problem.device.type not in self.info.device_types:
            known = ", ".join(sorted(self.info.device_types))
            return Decline("other_device", f"computes on {known}, not on {problem.device.type}")
        refusal = self.info.capabilities.refuse(problem)
        return refusal or self._call_hook(problem)

    def _call_hook(self, problem: Problem) -> Plan | Decline:
        name = hookspecs.hook_name(problem.family)
        caller = getattr(self.manager.hook, name)
        try:
            answers = caller(problem=problem)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin's fault, SystemExit included, must not take the others down
            return Decline("hook_error", f"hook {name} of backend '{self.name}' raised {_one_line(error)}")
        if not answers:
            return Decline("unclaimed_family", f"has no plan for this {problem.family} problem")
        answer = answers[0]
        if not isinstance(answer, (Plan, Decline)):
            return Decline(
                "hook_error",
                f"hook {name} of backend '{self.name}' returned {answer!r} instead of a Plan or a Decline",
            )
        foreign = sorted(set(answer.unfused) - problem.features) if isinstance(answer, Plan) else ()
        if foreign:
            return Decline(
                "hook_error",
                f"hook {name} of backend '{self.name}' leaves {', '.join(foreign)} unfused, which this problem has not",
            )
        return answer


def blame(error: BaseException, backend: str | None) -> None:
    """Note on an error that left a plan whose plan it was; the reference's errors are the core's own."""
    note = f"raised by the plan of backend '{backend}'"
    if backend not in (None, REFERENCE) and note not in getattr(error, "__notes__", ()):
        error.add_note(note)


class Registry:
    """Every backend of this process, by name, and every load failure."""

    def __init__(
        self, backends: Mapping[str, Backend], failures: Mapping[str, LoadFailure], excluded: tuple[str, ...]
    ) -> None:
        self.backends = dict(backends)
        self.failures = dict(failures)
        self.excluded = excluded
        """Installed entry points that ``TORCHHAL_PLUGINS`` leaves out."""

    def get(self, name: str) -> Backend:
        """The backend called ``name``.

        Raises:
            InvalidProblem: ``name`` is no string.
            BackendLoadError: it is installed and failed to load.
            BackendNotFound: it is not installed; says what is, and how to install known ones.
        """
        if not isinstance(name, str):
            example = f"such as '{REFERENCE}'"
            raise InvalidProblem(
                f"a choice of backend expects the name of a backend, {example}, and got {name!r} ({type(name).__name__})"
            )
        if name in self.backends:
            return self.backends[name]
        if name in self.failures:
            raise BackendLoadError(
                f"backend '{name}' is installed and can not be used: {self.failures[name]}"
            )
        raise BackendNotFound(self._not_found(name))

    def _not_found(self, name: str) -> str:
        lines = [f"no backend is called '{name}'. Installed: {', '.join(sorted(self.backends))}."]
        if self.excluded:
            lines.append(f"Left out by TORCHHAL_PLUGINS: {', '.join(self.excluded)}.")
        lines += [f"Failed to load: {failure}." for failure in self.failures.values()]
        extra = name.replace("_", "-")
        known = known_extras()
        if extra in known:
            lines.append(f'To install it: pip install "torchhal[{extra}]".')
        else:
            lines.append(
                f'Backends torchhal knows by name: {", ".join(known)}; pip install "torchhal[NAME]" adds one.'
            )
        return "\n".join(lines)


def known_extras() -> list[str]:
    """The backends that torchhal's own metadata offers as extras."""
    try:
        extras = metadata.metadata("torchhal").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []
    return sorted(extra for extra in extras if extra not in ("conformance", "bench"))


# ---------------------------------------------------------------------------- loading

_lock = threading.RLock()
_registry: Registry | None = None


def registry() -> Registry:
    """The process's registry; plugins are imported on the first call."""
    global _registry
    if _registry is None:
        with _lock:
            if _registry is None:
                _registry = load()
    return _registry


def reset() -> None:
    """Forget the loaded plugins; they are found again when next needed."""
    global _registry
    with _lock:
        _registry = None


def load() -> Registry:
    """Import and verify the reference and every installed plugin that ``TORCHHAL_PLUGINS`` admits."""
    from torchhal.reference import plugin as reference

    backends: dict[str, Backend] = {}
    failures: dict[str, LoadFailure] = {}
    backend = verify(REFERENCE, "torchhal", reference, _own_version())
    assert isinstance(backend, Backend), backend
    backends[REFERENCE] = backend
    wanted = wanted_plugins()
    excluded = []
    for point in sorted(metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        if wanted is not None and point.name not in wanted:
            excluded.append(point.name)
            continue
        outcome = _load_entry_point(point, taken=backends)
        if isinstance(outcome, Backend):
            backends[point.name] = outcome
        else:
            failures[point.name] = outcome
    for name in sorted((wanted or set()) - {*backends, *failures}):
        failures[name] = LoadFailure(
            name,
            "no distribution",
            "import",
            f"TORCHHAL_PLUGINS names it and no installed entry point in {ENTRY_POINT_GROUP} is called so",
        )
    return Registry(backends, failures, tuple(excluded))


def _own_version() -> str:
    try:
        return metadata.version("torchhal")
    except metadata.PackageNotFoundError:
        return ""


def wanted_plugins() -> set[str] | None:
    """Names in ``TORCHHAL_PLUGINS``; None when it is not set, so that all are loaded."""
    value = os.environ.get("TORCHHAL_PLUGINS")
    if value is None:
        return None
    return {name.strip() for name in value.split(",") if name.strip()}


def _load_entry_point(point: metadata.EntryPoint, taken: Mapping[str, Backend]) -> Backend | LoadFailure:
    distribution = point.dist.name if point.dist else "an unknown distribution"
    if point.name in taken:
        other = taken[point.name].distribution
        return LoadFailure(
            point.name, distribution, "identity", f"the name is taken by {other}; uninstall one of them"
        )
    try:
        plugin = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an import can fail with anything, SystemExit included
        return LoadFailure(point.name, distribution, "import", _one_line(error), traceback.format_exc())
    return verify(point.name, distribution, plugin, point.dist.version if point.dist else "")


def verify(name: str, distribution: str, plugin: Any, version: str = "") -> Backend | LoadFailure:
    """Check a plugin against the specification: hooks, arguments, identity and version range."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name=name)
        _refuse_unknown_hooks(manager, plugin)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return LoadFailure(name, distribution, "verify", _one_line(error), traceback.format_exc())
    try:
        answers = manager.hook.torchhal_backend()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reason = f"its hook torchhal_backend raised {_one_line(error)}"
        return LoadFailure(name, distribution, "identity", reason, traceback.format_exc())
    problem = _identity_problem(name, answers)
    if problem:
        return LoadFailure(name, distribution, *problem)
    return Backend(answers[0], distribution, version or answers[0].version, plugin, manager)


def _refuse_unknown_hooks(manager: pluggy.PluginManager, plugin: Any) -> None:
    known = [name for name in vars(hookspecs) if name.startswith("torchhal_")]
    for caller in manager.get_hookcallers(plugin) or ():
        if not caller.has_spec():
            raise TypeError(
                f"implements the unknown hook '{caller.name}'; hooks of specification {SPEC_VERSION} are {', '.join(known)}"
            )
    for name in known:
        function = getattr(plugin, name, None)
        if callable(function) and not hasattr(function, f"{hookspecs.PROJECT}_impl"):
            raise TypeError(
                f"its function '{name}' is not marked with @torchhal.hookimpl, so it would never be called"
            )


def _identity_problem(name: str, answers: list[Any]) -> tuple[str, str] | None:
    if not answers or not isinstance(answers[0], BackendInfo):
        got = repr(answers[0]) if answers else "nothing"
        return "identity", f"its hook torchhal_backend must return a torchhal.BackendInfo and returned {got}"
    info = answers[0]
    fault = field_fault(info)
    if fault:
        return "identity", fault
    if info.name != name:
        return "identity", f"it calls itself '{info.name}' and its entry point '{name}'; the two must agree"
    from packaging.specifiers import InvalidSpecifier, SpecifierSet  # 10 ms, when backends are loaded

    try:
        accepts = SpecifierSet(info.spec).contains(SPEC_VERSION)
    except InvalidSpecifier:
        return "version", f"its specification range {info.spec!r} is not of the form '>=1.0,<2'"
    if not accepts:
        return (
            "version",
            f"it was written for hook specification {info.spec} and this core has {SPEC_VERSION}; upgrade whichever is older",
        )
    return None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
