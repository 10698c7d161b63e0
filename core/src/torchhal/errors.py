"""Every error and warning torchhal raises, with what each one means for the caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchhal.selection import Route


class TorchhalError(Exception):
    """Base of every error raised by torchhal."""


class InvalidProblem(TorchhalError, ValueError):
    """The call means nothing on any backend: a wrong rank, mismatched heads, mixed devices."""


class CaptureError(InvalidProblem):
    """A user function does something the pointwise language has no word for; names the line that does."""


class ConfigurationError(TorchhalError, ValueError):
    """An environment variable or lock file says something that can not be honoured."""


class BackendNotFound(TorchhalError, LookupError):
    """A backend was asked for by name and is not installed; lists what is, and what failed to load."""


class BackendLoadError(TorchhalError, ImportError):
    """A backend was asked for by name and is installed, but its plugin could not be loaded."""


class AmbiguousBackends(TorchhalError, RuntimeError):
    """Two backends claim the same problem with equal preference; the caller has to choose."""


class Unsupported(TorchhalError, RuntimeError):
    """Nobody the policy allows can serve the call; carries every backend's reason.

    Attributes:
        route: the :class:`~torchhal.selection.Route` with all declines, or None where the refusal
            did not come from a selection.
    """

    def __init__(self, message: str, route: Route | None = None) -> None:
        super().__init__(message)
        self.route = route


class PagedCacheFull(TorchhalError, RuntimeError):
    """A PagedKVCache has no room for what a call brings; nothing of it was written, and the cache is as it was.

    Attributes:
        needed: how many more pages the call needs, of the pool or for one sequence.
        free: how many it could have had.
    """

    def __init__(self, message: str, needed: int, free: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free


class CacheIntegrityError(TorchhalError, RuntimeError):
    """A stored cache is truncated, altered, or was made for another environment; nothing of it was loaded."""


class FallbackWarning(UserWarning):
    """An automatic choice fell back to a slower backend; given once per Route, naming the Decline."""


class BackendWarning(UserWarning):
    """A plugin misbehaved during an automatic choice (raised in a hook, failed to load) and was passed over."""
