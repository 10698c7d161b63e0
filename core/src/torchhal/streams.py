"""Streams and graphs of whatever device tensors are on."""

from __future__ import annotations

import functools
from typing import Any

import torch


def stream_of(device: torch.device) -> Any:
    """What tells the device's current stream from its others; None where there are none."""
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


def is_capturing(device: torch.device) -> bool:
    """Whether calls are being recorded into a graph of the device, rather than run."""
    asked = _asking(device.type)
    return asked is not None and bool(asked())


@functools.cache
def _asking(kind: str) -> Any:
    return (
        None if kind == "cpu" else getattr(torch.get_device_module(kind), "is_current_stream_capturing", None)
    )
