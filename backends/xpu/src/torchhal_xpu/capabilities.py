"""What this backend claims on suitable hardware; everything it does not name, it does not serve."""

from __future__ import annotations

from typing import Final

from torchhal.problems import Capabilities, DeployClaims

CAPABILITIES: Final = Capabilities(deploy=DeployClaims(tasks=frozenset({"compile_options", "profiler"})))
"""No kernels in this version: attention, matmul, foreach, context parallelism and caches are left None, so
the core declines them for this backend and says so in every Route."""
