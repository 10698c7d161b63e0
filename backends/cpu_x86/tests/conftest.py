"""Lets the tests of this folder import the helpers that lie beside them, in any import mode of pytest."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
