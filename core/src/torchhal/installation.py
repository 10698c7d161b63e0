"""torch's own attention served in a whole process: on every thread, and at no cost to any other call.

The mode (:mod:`torchhal.mode`) belongs to one thread and costs each of torch's functions a microsecond, which a small
model of two thousand calls a token feels. An installation instead replaces the kernel that torch's dispatcher holds for
``aten::scaled_dot_product_attention``. Whoever calls it, by whatever name and from C++ too, arrives there.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Final

import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor

from torchhal import mode_flex
from torchhal.errors import ConfigurationError
from torchhal.mode import active_mode
from torchhal.mode_sdpa import Settings, four_flags, scaled_dot_product_attention
from torchhal.registry import registry
from torchhal.scope import thread

OPERATOR: Final = "scaled_dot_product_attention"
KEY: Final = "CompositeImplicitAutograd"
"""Where torch has its one kernel for all devices, above autograd; dtypes are those that autocast wants by then."""


class Installation(AbstractContextManager["Installation"]):
    """What :func:`install` has put into torch, until :meth:`remove` or the end of a ``with`` block."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._undo = ExitStack()

    def remove(self) -> None:
        """Give torch its own kernels back. Removing twice is no error."""
        global _installed
        with _lock:
            self._undo.close()
            if _installed is self:
                _installed = None

    def __exit__(self, *_: object) -> None:
        self.remove()


_lock = threading.RLock()
_installed: Installation | None = None


def installed() -> Installation | None:
    """The installation of this process, if there is one."""
    return _installed


def install(backend: str | None = None, strict: bool | None = None) -> Installation:
    """Serve torch's own attention with the best backend in the whole process; what ``torchhal run`` does.

    Covers ``scaled_dot_product_attention`` under every name, inside ``nn.MultiheadAttention`` and in C++, and
    ``flex_attention``, on all threads, in eager mode and in what is compiled from now on. Other calls cost what they did.
    ``torch._foreach_*`` is for :func:`torchhal.enable`, as is a choice for one block. Also a context manager::

        installation = torchhal.install()
        ...
        installation.remove()

    Compiled functions keep the backend that was chosen while they were compiled: install before, and put ``use()``
    around the first call. AOTAutograd's cache on disk is off meanwhile, since its keys do not tell who serves.

    Args:
        backend: as for :func:`torchhal.enable`.
        strict: as for :func:`torchhal.enable`.

    Raises:
        BackendNotFound, BackendLoadError: there is no such backend, or it failed to load.
        ConfigurationError: there is an installation already, or this is compiled code.
    """
    global _installed
    if torch.compiler.is_dynamo_compiling():
        raise ConfigurationError("install() changes the process; call it outside the compiled function")
    if backend is not None:
        registry().get(backend)
    with _lock:
        if _installed is not None:
            raise ConfigurationError(
                f"torchhal is installed already (backend={_installed.settings.backend!r}, "
                f"strict={_installed.settings.strict!r}); remove() that installation first, or choose for one block "
                "with torchhal.enable(...) or torchhal.use(...)"
            )
        installation = Installation(Settings(backend, strict, four_flags(backend, strict)))
        try:
            _put_into_torch(installation)
        except BaseException:
            installation.remove()
            raise
        _installed = installation
        return installation


# ---------------------------------------------------------------------------- what is changed in torch


def _put_into_torch(installation: Installation) -> None:
    undo, settings = installation._undo, installation.settings
    _replace_kernel(settings, undo)
    _set(torch_flex, "flex_attention_hop", _flex_attention(settings), undo)
    # Its kernel for whole layers would pass the attention inside by; the mode is passed by for the same reason.
    undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)
    import torch._functorch.config as functorch

    _set(functorch, "enable_autograd_cache", False, undo)


def _set(owner: Any, name: str, value: Any, undo: ExitStack) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _flex_attention(settings: Settings) -> Callable[..., Any]:
    """Stands where torch's flex_attention looks for the operator it ends in."""
    mode: Any = settings

    def flex_attention(*args: Any, **kwargs: Any) -> Any:
        if active_mode() is not None:  # chose for the block, so decides
            return mode_flex.torchs_own(*args, **kwargs)
        return mode_flex.flex_attention(mode, *args, **kwargs)

    return flex_attention


def _replace_kernel(settings: Settings, undo: ExitStack) -> None:
    transforms_active = torch._C._are_functorch_transforms_active
    torchs_own = torch.library.get_kernel(f"aten::{OPERATOR}", "CPU")  # the same on every device

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        result = None
        if not (
            thread.uninstalled or transforms_active()
        ):  # inside a transform no autograd.Function can be called
            result = scaled_dot_product_attention(
                settings, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        if result is None:
            keys = torch._C._dispatch_keys(query)  # here, since torch takes 0.3 us to hand a kernel its keys
            return torchs_own.call_boxed(
                keys, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return result

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    undo.callback(library._destroy)  # the dispatcher then falls back to the kernel before
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="[\\s\\S]*Overriding a previously registered kernel")
        library.impl(OPERATOR, kernel, KEY)  # type: ignore[no-untyped-call]
