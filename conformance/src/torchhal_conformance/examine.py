"""One case of one backend, in this process: what the worker does, and what a person who reproduces a case does."""

from __future__ import annotations

import importlib
import time
import traceback
from pathlib import Path
from typing import Any, Final

from torchhal.errors import Unsupported
from torchhal.registry import Backend, registry, verify
from torchhal_conformance import calls
from torchhal_conformance.model import Case, CheckFailed, HarnessError, Measured

Result = dict[str, Any]
"""The part of a result record that depends on the run."""


def load_plugin(specification: str) -> str:
    """Add a backend that is not installed, ``module:attribute``, to this process; returns its name.

    Raises:
        ValueError: it does not load as a plugin; says why.
    """
    module, _, attribute = specification.partition(":")
    try:
        plugin: Any = importlib.import_module(module)
        for part in attribute.split(".") if attribute else ():
            plugin = getattr(plugin, part)
        name = plugin.torchhal_backend().name
    except (Exception, SystemExit) as error:
        raise ValueError(f"plugin {specification} does not load: {type(error).__name__}: {error}") from error
    outcome = verify(name, f"plugin {specification}", plugin)
    if not isinstance(outcome, Backend):
        raise ValueError(f"{specification} is no plugin: {outcome}")
    registry().backends[name] = outcome
    return str(name)


def examine(case: Case, backend: str) -> Result:
    """Run one case; whatever happens becomes a result, but for what ends the process."""
    begin = time.perf_counter()
    found: Result = {
        "status": "pass",
        "ratio": None,
        "error": None,
        "expected": None,
        "got": None,
        "note": None,
    }
    try:
        found |= _outcome(case, backend)
    except CheckFailed as failure:
        found |= {"status": "fail", "ratio": failure.ratio, "expected": failure.expected, "got": failure.got}
        found["error"] = _error("CheckFailed", str(failure))
    except HarnessError as failure:
        found |= {"status": "error", "error": _error("HarnessError", str(failure))}
    except Unsupported as refusal:
        found |= {"status": "untestable", "error": _error("Unsupported", str(refusal))}
    except BaseException as error:  # a backend may raise anything, SystemExit included
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" (at {last[0].name}, line {last[0].lineno})" if last else ""
        status = "error" if last and _is_ours(last[0].filename) else "fail"
        found |= {"status": status, "error": _error(type(error).__name__, f"{_said(error)}{where}")}
        found |= {"expected": "no exception", "got": type(error).__name__}
    return {**found, "seconds": time.perf_counter() - begin}


_HERE: Final = Path(__file__).parent


def _is_ours(file: str) -> bool:
    """Whether an exception was raised by the suite's own lines; what a call returns is checked before they see it."""
    path = Path(file)
    return path.is_relative_to(_HERE) and not path.is_relative_to(_HERE / "mutants")


def _outcome(case: Case, backend: str) -> Result:
    lacking = case.check.facilities - calls.facilities(backend)
    if lacking:  # asked for by name: no run selects it
        have = calls.device_of(backend)
        raise HarnessError(f"the case does not apply: {have} has no {' and no '.join(sorted(lacking))}")
    missing = case.sample.needs.unclaimed(registry().get(backend).info.capabilities)
    if not missing:
        measured: Measured = case.check.run(backend, case.sample, case.data_seed)
        return {"ratio": measured.ratio, "note": measured.note or None}
    inputs = calls.make(case.sample, backend, case.data_seed)
    for leaf in case.sample.leaves:  # gradients are asked for by the inputs
        inputs[leaf].requires_grad_()
    if not calls.is_refused(case.sample, backend, inputs):
        raise CheckFailed(f"Unsupported, since {', '.join(missing)} is not claimed", "a result")
    return {"status": "unsupported-verified"}


def _said(error: BaseException) -> str:
    """The message of an error, of which even that may fail."""
    try:
        return str(error)
    except Exception:
        return "an error without a message"


def _error(kind: str, message: str) -> dict[str, str]:
    return {"class": kind, "message": " ".join(message.split())[:2000]}
