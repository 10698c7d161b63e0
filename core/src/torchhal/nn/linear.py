"""``nn.Linear`` through :func:`torchhal.matmul`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchhal.chains import Layer, Link
from torchhal.errors import InvalidProblem
from torchhal.matmul import Call, Functions, element_dtype, matmul, run
from torchhal.nn.chain import Chain, Watched
from torchhal.nn.storage import PackedStorage, training_text
from torchhal.operands import Packed
from torchhal.pointwise import Captured

Epilogue = Callable[..., Tensor]


class FusedLinear(nn.Module):
    """``x @ weight.T + bias`` by the best backend there is: what ``nn.Linear`` computes, bias and epilogue in one pass.

    The weight is a parameter (N, K), as in ``nn.Linear`` and under the same name, or packed, and then a buffer without
    gradient. A result has the promoted type of input and weight, and that of the input where the weight is packed;
    under autocast it has autocast's, as that of ``nn.Linear``.

    Args:
        weight: the parameter, or a packed weight of shape (K, N), or the storage of one, to tie modules together.
        bias: (N,) or None.
        backend: as in :func:`torchhal.matmul`.
        frozen: the packed weight is meant to stay as it is while other parts of the model train through it. Else
            a forward pass in training mode is an error.

    Raises:
        InvalidProblem: the bias does not fit the weight.
    """

    packed: PackedStorage | None

    def __init__(
        self,
        weight: nn.Parameter | Packed | PackedStorage,
        bias: nn.Parameter | None = None,
        *,
        backend: str | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        packed = PackedStorage(weight) if isinstance(weight, Packed) else weight
        self.register_parameter("weight", packed if isinstance(packed, nn.Parameter) else None)
        self.register_parameter("bias", bias)
        self.register_module("packed", packed if isinstance(packed, PackedStorage) else None)
        shape = packed.weight.shape if isinstance(packed, PackedStorage) else packed.shape[::-1]
        self.in_features, self.out_features = (int(size) for size in shape)
        self.backend = backend
        self.frozen = frozen
        self._chain = None if self.packed is None else Chain(Link())
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise InvalidProblem(
                f"bias expects the shape (N,) = ({self.out_features},), the rows of the weight, and has {tuple(bias.shape)}"
            )

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, backend: str | None = None) -> FusedLinear:
        """The same layer, on the same parameters."""
        weight, bias = linear.get_parameter("weight"), linear._parameters["bias"]
        return cls(weight, bias, backend=backend).train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) to (..., N).

        Raises:
            InvalidProblem: the weight is packed and would be trained.
            Unsupported: no backend that the policy allows serves the product.
        """
        chain = self._chain
        if chain is not None:
            result = chain.run(input, self)
            if result is not None:
                return result
        if input.dim() < 3:
            return self.product(input)
        return self.product(input.flatten(0, -2)).reshape(*input.shape[:-1], self.out_features)

    def product(
        self, x: Tensor, epilogue: Epilogue | None = None, captured: Captured | None = None
    ) -> Tensor:
        """The layer on rows (M, K), with an epilogue as :func:`torchhal.matmul` takes it.

        Args:
            x: the rows, or one row (K,).
            epilogue: a pointwise function of one result.
            captured: the same function, captured for float32 elements beforehand.
        """
        x, weight, bias, out_dtype = self._operands(x)
        if (
            captured is not None
            and not torch.compiler.is_compiling()
            and element_dtype(x, weight) == torch.float32
        ):
            return _single(run(Call(x, weight, bias, Functions(epilogue=captured), out_dtype, self.backend)))
        result = matmul(x, weight, bias=bias, epilogue=epilogue, out_dtype=out_dtype, backend=self.backend)
        return _single(result)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor | Packed, Tensor | None, torch.dtype | None]:
        # By the dictionaries: an attribute of a module takes 0.7 us, of the 3 that torchhal allows itself in a call.
        own = self._parameters
        bias: Tensor | None = own["bias"] if "bias" in own else self._taken("bias")
        packed = self._modules["packed"]
        low = _autocast_dtype(x)
        if packed is None:
            weight: Tensor | None = own["weight"] if "weight" in own else self._taken("weight")
            assert weight is not None
            if low is None:
                return x, weight.mT, bias, None
            return x.to(low), weight.to(low).mT, None if bias is None else bias.to(low), None
        assert isinstance(packed, PackedStorage)
        if self.training and not self.frozen and torch.is_grad_enabled():
            raise InvalidProblem(training_text(packed.weight.scheme, "swap it with weight=None"))
        x = x if low is None else x.to(low)
        return x, packed.weight, bias, x.dtype

    def linked(self) -> tuple[FusedLinear]:
        """Of its chain: itself."""
        return (self,)

    def passed_over(self) -> dict[str, nn.Module]:
        """Nothing."""
        return {}

    def layer(self) -> Layer:
        """What a packed layer multiplies by, in a chain."""
        own, packed = self._parameters, self._modules["packed"]
        assert isinstance(packed, PackedStorage)
        return Layer(packed.weight, own["bias"] if "bias" in own else self._taken("bias"), self.backend)

    def watched(self) -> list[Watched]:
        """Where it would be seen that a packed layer multiplies by something else."""
        packed = self._modules["packed"]
        assert isinstance(packed, PackedStorage)
        bias = (self._parameters, "bias", self._parameters.get("bias"))
        return [
            bias,
            (self._modules, "packed", packed),
            (vars(self), "backend", self.backend),
            *packed.watched(),
        ]

    def _taken(self, name: str) -> Tensor | None:
        """What stands in the place of a parameter that pruning or a parametrization took out."""
        value: Tensor | None = getattr(self, name)
        return value

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.packed is not None and f"{prefix}weight" in state_dict:
            messages = rest[-1]
            messages.append(
                f"{prefix}weight is a floating weight, and this layer holds a packed one ({self.packed.weight.scheme}); "
                "load the state before optimize_linear() or load_packed()"
            )

    def extra_repr(self) -> str:
        """Sizes as ``nn.Linear`` prints them, and who serves if that was chosen."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        return text if self.backend is None else f"{text}, backend={self.backend!r}"


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What ``nn.Linear`` would convert its operands to, None where nothing. Autocast leaves float64 alone."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


def _single(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    assert isinstance(result, Tensor)
    return result
