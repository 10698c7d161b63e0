"""Names of torch functions, whatever form they are called in, and what to do in place of the refused ones."""

from __future__ import annotations

from typing import Any, Final

from torch._ops import OpOverload, OpOverloadPacket

_ALIASES: Final = {
    "truediv": "div", "divide": "div", "true_divide": "div", "rtruediv": "operator_rdiv", "rdiv": "operator_rdiv",
    "subtract": "sub", "multiply": "mul", "negative": "neg", "absolute": "abs", "floordiv": "floor_divide",
    "mod": "remainder", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not",
    "lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift", "less": "lt", "less_equal": "le",
    "greater": "gt", "greater_equal": "ge", "not_equal": "ne", "arcsin": "asin", "arccos": "acos",
    "arctan": "atan", "arctan2": "atan2", "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh",
    "expit": "sigmoid", "fix": "trunc", "clip": "clamp", "pos": "positive", "radd": "add",
    "rmul": "mul", "ror": "bitwise_or", "rxor": "bitwise_xor",
}  # fmt: skip

_GROUPS: Final = {
    "reduces over many elements, and a pointwise function sees one scalar at a time: "
    "compute it outside and capture the resulting tensor": (
        "sum", "mean", "prod", "std", "var", "norm", "amax", "amin", "argmax", "argmin", "softmax", "log_softmax",
        "logsumexp", "cumsum", "cumprod", "any", "all", "median", "sort", "topk", "nansum", "count_nonzero",
        "matmul", "mm", "bmm", "dot", "einsum", "linear", "layer_norm", "rms_norm",
    ),
    "draws random numbers, and a captured function must give the same result at every evaluation: "
    "draw outside and capture the tensor (for dropout use dropout_p)": (
        "dropout", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial", "rand", "randn",
        "randint", "randperm", "normal", "poisson",
    ),
    "needs a shape, and a value is a scalar: leave it out, or compute it outside on the captured tensor": (
        "view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "transpose", "permute", "cat", "stack",
        "flatten", "repeat", "t", "T", "mT", "chunk", "split", "narrow", "select", "broadcast_to", "tile", "index_select",
    ),
    "reads data, which does not exist while the function is captured: use the value itself, "
    "and torch.where in place of a branch": ("item", "tolist", "numpy", "cpu", "cuda", "__array__", "equal", "allclose"),
}  # fmt: skip
RANDOM: Final = frozenset(next(names for text, names in _GROUPS.items() if text.startswith("draws")))
_ADVICE: Final = {name: text for text, names in _GROUPS.items() for name in names}


READS: Final = {
    "__bool__": "bool", "__float__": "float", "__int__": "int", "__index__": "int", "__complex__": "complex",
    "__contains__": "in", "__array__": "numpy",
}  # fmt: skip
"""Special methods that turn a tensor into Python data, and what the user wrote; ``Tensor.float`` is no such thing."""


def name_of(func: Any) -> str:
    """One name for ``torch.f``, ``Tensor.f``, ``F.f``, ``torch.special.f`` and ``torch.ops.aten.f``."""
    if isinstance(func, OpOverload):
        name = func._schema.name.partition("::")[2]
    elif isinstance(func, OpOverloadPacket):
        name = func.__name__
    else:
        name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        return str(getattr(func.__self__, "__name__", name))
    return _plain(name)


def _plain(name: str) -> str:
    if name in READS:
        return name
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name.startswith("i") and name[1:] in _IN_PLACE:
            return name[1:] + "_"
    name = name.removeprefix("special_")
    if name == "rand":  # torch.rand, or Tensor.__rand__ which never reaches a capture by this name
        return name
    return _ALIASES.get(name, name)


_IN_PLACE: Final = frozenset(
    ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
)


def is_in_place(name: str) -> bool:
    """Whether a torch function of this name changes its first argument."""
    return name in ("setitem", "set_data") or (name.endswith("_") and not name.endswith("__"))


def advice_for(name: str) -> str:
    """What to do in place of a torch function that can not be captured."""
    if is_in_place(name):
        return f"it changes a tensor in place; use the out-of-place form {name.rstrip('_')} and its result"
    known = _ADVICE.get(name)
    if known:
        return f"it {known}"
    return "it is not in the pointwise language: write it with arithmetic, comparisons, torch.where and torch's elementwise functions"
