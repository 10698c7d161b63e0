"""Somebody else's kernels in place of these, for the calls that they compute faster, with what they lack supplied.

A fused kernel hides a key by a weight of 0, and 0 times NaN is NaN: what is not finite in a hidden key reaches rows that do not
see it, where the contract has it reach none. It always arrives as something that is not finite. So after an engine the kernels
here look at its result, and compute again, exactly, the tiles that hold a NaN or an infinity. That costs one reading of
the result, needs nothing from the host, and is captured in a graph like any launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Engine(NamedTuple):
    """Another implementation of one problem in the dense layout, without masks, functions or dropout."""

    serves: Callable[[Tensor, Tensor, float], bool]
    """Whether it takes a call with this query, key and scale; the others go to the kernels here. The same for every call of the
    same shapes and scale, so that neither strides nor data decide whose last bits a result has."""
    forward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """``(query, key, value, scale)`` to output (B, Hq, L, Ev) and LSE (B, Hq, L), float32, the latter without elements where
    the problem asks for none."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    """``(query, key, value, scale, out, lse, out's gradient, lse's or None)`` to the gradients of query, key and value; None
    where the kernels here compute them."""
