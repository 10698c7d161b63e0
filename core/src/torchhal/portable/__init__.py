"""Kernels in Triton that know no vendor: a backend whose hardware has a Triton compiler starts from them.

- :mod:`torchhal.portable.printer` prints a pointwise :class:`~torchhal.pointwise.Graph` as a Triton function;
- :mod:`torchhal.portable.attention` computes attention, with such functions inside its kernel;
- :mod:`torchhal.portable.matmul` computes fused matrix products, likewise.

A backend supplies what depends on its hardware, the sizes of tiles, and claims what it has tested. The core does not
depend on Triton: it is imported when a kernel is first wanted, and :func:`unavailable` says why it can not be.
"""

from __future__ import annotations

import functools
from importlib import import_module, metadata
from typing import Final

from torchhal.problems import Decline

MINIMUM_TRITON: Final = (3, 6)
"""The first release that these kernels were tested with."""


@functools.cache
def unavailable() -> Decline | None:
    """Why Triton can not be used here, or None when it can. Looked at once for each process."""
    try:
        import_module("triton.language")
        found = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found = str(getattr(import_module("triton"), "__version__", "0"))
    except ImportError as error:
        return Decline(
            "triton_missing",
            f"Triton can not be imported ({error}); install the triton package that belongs to this torch",
        )
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if release < MINIMUM_TRITON:
        needed = ".".join(map(str, MINIMUM_TRITON))
        return Decline("triton_too_old", f"triton is {found}; {needed} or later is needed")
    return None
