"""Checks whether a torchhal backend does what it claims.

This version has the first part: :func:`smoke`, which checks a backend's identity and claims.
"""

from torchhal_conformance.report import Finding, Report
from torchhal_conformance.runner import smoke

__all__ = ["Finding", "Report", "smoke"]


def __getattr__(name: str) -> str:
    """``__version__``, read from the installed metadata when asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("torchhal-conformance")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
