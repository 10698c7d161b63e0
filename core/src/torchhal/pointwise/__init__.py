"""One language for user functions: captured once, lowered by every backend.

A ``score_mod``, a ``mask_mod``, a prologue or epilogue, a ``foreach_map`` function is a pointwise
function over scalars and captured tensors. :func:`capture` runs it once on recording scalars and
gives a :class:`Graph` of a few dozen primitives, together with the tensors it closed over::

    slopes = torch.rand(8)

    def alibi(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    captured = capture(alibi, [("score", torch.float32), ("b", torch.int32), ("h", torch.int32),
                               ("q_idx", torch.int32), ("kv_idx", torch.int32)])
    print(captured.graph)       # a readable listing
    captured.graph.digest       # stable over processes and machines
    captured.tensors            # (slopes,)

A graph is immutable, hashable and canonical; ``to_text`` and ``from_text`` store it. It means what
:func:`evaluate` computes, in the dtypes torch's eager mode would use. :func:`differentiate` gives the
graph of its gradients. :func:`capture_cached` is :func:`capture` for hot paths: it recognises a
function it has seen with other tensors. :func:`substitute`, :func:`shift`, :func:`concatenate`,
:func:`and_masks`, :func:`or_masks` and :func:`masked_score` make graphs from graphs.

A backend lowers the names in :data:`PRIMITIVES` and nothing else. What can not be captured raises
:class:`~torchhal.errors.CaptureError`, naming the operation, the user's line, and what to write instead.
"""

from torchhal.pointwise.builder import GraphBuilder
from torchhal.pointwise.capture import Captured, capture
from torchhal.pointwise.compose import and_masks, concatenate, masked_score, or_masks, shift, substitute
from torchhal.pointwise.differentiate import Contribution, Gradient, differentiate
from torchhal.pointwise.evaluate import evaluate
from torchhal.pointwise.graph import CapturedSpec, Graph, Input, Node
from torchhal.pointwise.memo import capture_cached, clear_cache, function_key
from torchhal.pointwise.primitives import COMMUTATIVE, PRIMITIVES, Primitive
from torchhal.pointwise.promotion import Kind
from torchhal.pointwise.values import Value

__all__ = [
    "COMMUTATIVE",
    "PRIMITIVES",
    "Captured",
    "CapturedSpec",
    "Contribution",
    "Gradient",
    "Graph",
    "GraphBuilder",
    "Input",
    "Kind",
    "Node",
    "Primitive",
    "Value",
    "and_masks",
    "capture",
    "capture_cached",
    "clear_cache",
    "concatenate",
    "differentiate",
    "evaluate",
    "function_key",
    "masked_score",
    "or_masks",
    "shift",
    "substitute",
]
