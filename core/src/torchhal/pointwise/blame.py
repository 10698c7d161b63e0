"""Finds the line of the user's code that an error is about, and says so."""

from __future__ import annotations

import linecache
import os
import sys
from types import FrameType
from typing import Final

import torch

from torchhal.errors import CaptureError

_OURS: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH: Final = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


def user_frame() -> FrameType | None:
    """The innermost frame that belongs neither to torch, to torchhal, nor to the import machinery."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_machinery(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _is_machinery(filename: str) -> bool:
    return filename.startswith((_OURS, _TORCH, "<frozen"))


def source_line() -> str:
    """The text of the user's line being executed; empty where there is no source to read."""
    frame = user_frame()
    return "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def place() -> str:
    """``file:line: source line`` of the user's code being executed."""
    frame = user_frame()
    if frame is None:
        return "unknown line"
    where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"{where}: {source}" if source else where


def capture_error(what: str, operation: str, advice: str) -> CaptureError:
    """The error for ``operation`` met while capturing a ``what``, pointing at the user's line."""
    return CaptureError(f"cannot capture this {what}: {operation}\n  at {place()}\n  {advice}")
