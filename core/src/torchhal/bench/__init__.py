"""Measurements: attention against its peers and the machine's own limits, and what torchhal itself costs.

Imported by the command line alone. Every comparison is made inside one run, candidates taking turns, because on
a shared machine two runs differ by more than most kernels do.
"""

from __future__ import annotations
