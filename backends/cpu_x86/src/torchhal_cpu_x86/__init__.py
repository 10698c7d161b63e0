"""torchhal's backend for x86-64 CPUs: native attention kernels for AVX2, AVX-512 and its bfloat16 dot product."""

from __future__ import annotations
