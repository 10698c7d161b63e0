"""One language for user functions."""

from torchhal.pointwise.builder import GraphBuilder
from torchhal.pointwise.capture import Captured, capture
from torchhal.pointwise.evaluate import evaluate
from torchhal.pointwise.graph import CapturedSpec, Graph, Input, Node
from torchhal.pointwise.primitives import PRIMITIVES, Primitive

__all__ = ["PRIMITIVES", "Captured", "CapturedSpec", "Graph", "GraphBuilder", "Input", "Node", "Primitive", "capture", "evaluate"]
