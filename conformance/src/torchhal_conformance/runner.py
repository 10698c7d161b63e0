"""Runs checks over an installed backend and gathers what they find."""

from __future__ import annotations

from torchhal.registry import Backend, registry
from torchhal_conformance.checks import contract
from torchhal_conformance.report import Finding, Report


def smoke(backend: str) -> Report:
    """Check the identity and the claims of an installed backend, in about a second and without its hardware.

    It proves that the backend is consistent with the specification, and nothing about its numbers.

    Args:
        backend: name of an installed backend, as in ``torchhal.backends()``.

    Raises:
        BackendNotFound, BackendLoadError: there is no such backend, or it failed to load.
    """
    return examine(registry().get(backend))


def examine(backend: Backend) -> Report:
    """The smoke checks over a backend that is already loaded."""
    outcomes = [outcome for check in contract.CHECKS for outcome in check(backend)]
    findings = tuple(outcome for outcome in outcomes if isinstance(outcome, Finding))
    return Report(backend.name, backend.version, "smoke", len(outcomes), findings)
