"""The environment variables torchhal reads, in one place; an unknown one is reported, not ignored."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterable
from typing import Final

from torchhal.errors import BackendWarning, ConfigurationError
from torchhal.hookspecs import FAMILIES

VARIABLES: Final = {
    "TORCHHAL_BACKEND": "Backend for every family: one name, or names separated by commas, tried in that order.",
    **{
        f"TORCHHAL_{f.upper()}_BACKEND": f"The same, for the {f} family alone; stronger than TORCHHAL_BACKEND."
        for f in FAMILIES
    },
    "TORCHHAL_STRICT": "1 makes every fallback of an automatic choice an error; 0 (the default) warns once.",
    "TORCHHAL_PLUGINS": "Entry points to load, separated by commas; empty loads none. Unset: all.",
    "TORCHHAL_LOCK": "Path of the selection lock file that `torchhal tune` writes; empty: use none.",
}
"""Name and meaning of each variable of the core. Backends read variables that begin with TORCHHAL_<THEIR NAME>_."""

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}


def strict() -> bool:
    """Whether ``TORCHHAL_STRICT`` asks for errors instead of fallbacks."""
    value = os.environ.get("TORCHHAL_STRICT", "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ConfigurationError(f"TORCHHAL_STRICT expects 1 or 0 and is {value!r}")


def preferred_backends(family: str) -> tuple[list[str], str] | None:
    """Names the environment chooses for ``family`` and the variable that does; None when none is set."""
    for variable in (f"TORCHHAL_{family.upper()}_BACKEND", "TORCHHAL_BACKEND"):
        value = os.environ.get(variable, "").strip()
        if not value:
            continue
        names = [name.strip() for name in value.split(",")]
        if not all(names):
            raise ConfigurationError(
                f"{variable} expects a backend or names separated by commas and is {value!r}"
            )
        return names, variable
    return None


def warn_unknown(backends: Iterable[str]) -> None:
    """Warn of each ``TORCHHAL_*`` variable that nothing reads: it is probably misspelt."""
    prefixes = tuple(f"TORCHHAL_{name.upper()}_" for name in backends)
    for name in sorted(os.environ):
        if not name.startswith("TORCHHAL_") or name in VARIABLES or name.startswith(prefixes):
            continue
        near = difflib.get_close_matches(name, VARIABLES, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; torchhal reads {', '.join(VARIABLES)}"
        warnings.warn(f"nothing reads the environment variable {name}{hint}", BackendWarning, stacklevel=3)
