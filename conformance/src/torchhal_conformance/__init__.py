"""Checks whether a torchhal backend does what it claims.

:func:`smoke` checks a backend's identity and claims; the command ``torchhal-conformance`` and the pytest plugin
(:mod:`torchhal_conformance.pytest_plugin`) examine what it computes. Importing this imports no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchhal_conformance.report import Finding, Report
    from torchhal_conformance.runner import smoke

__all__ = ["Finding", "Report", "smoke"]

_HOMES = {"Finding": "report", "Report": "report", "smoke": "runner"}


def __getattr__(name: str) -> Any:
    """The public names, imported when asked for, and ``__version__``, read from the installed metadata."""
    if name == "__version__":
        from importlib.metadata import version

        return version("torchhal-conformance")
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
