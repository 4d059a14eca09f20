"""The implementations of the operator, and the choice among them.

A new backend is one file with a `Backend` record, and one line in `BACKENDS`.
"""

import os
from functools import cache, lru_cache
from types import TracebackType

from replknet.kernels import aten, measured, native, reference, triton
from replknet.kernels.backend import ALGORITHMS, Algorithm, Backend, BackendError, Call

# asked in this order; the first that neither refuses nor declines a call takes it
BACKENDS: tuple[Backend, ...] = (
    native.BACKEND,
    measured.BACKEND,
    triton.BACKEND,
    aten.BACKEND,
    reference.BACKEND,
)

VARIABLE = "REPLKNET_BACKEND"
_forced: str | None = None


def _known(name: str) -> str:
    names = [backend.name for backend in BACKENDS]
    if name not in names:
        raise ValueError(f"no backend is called {name!r}; there are {', '.join(names)}")
    return name


def forced() -> str | None:
    """The backend that `use_backend` or the environment forces.

    Returns:
        Its name, or None.

    Raises:
        ValueError: `REPLKNET_BACKEND` names no backend.
    """
    if _forced is not None:
        return _forced
    return _from_environment()


@cache
def _from_environment() -> str | None:
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    try:
        return _known(name)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}={name}: {error}") from None


class use_backend:
    """Force one backend for every call in this process.

    The choice acts at once and lasts. As a context manager it restores the earlier choice at the end. It holds for
    all threads, since backward passes on CUDA run in other threads. It overrides the environment variable
    `REPLKNET_BACKEND`, which is read once.

    Args:
        name: the name of a backend (`replknet.doctor()` lists them), or None for the automatic choice.

    Raises:
        ValueError: no backend has that name.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        self._before = _forced
        _forced = None if name is None else _known(name)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self._before


def refusals(call: Call) -> dict[str, str | None]:
    """What each backend says about a call.

    Args:
        call: of the operator.

    Returns:
        Name -> why it refuses the call; None if it takes the call when asked by name.
    """
    return {backend.name: backend.refusal(call) for backend in BACKENDS}


def choose(call: Call) -> Backend:
    """The first backend that neither refuses nor declines the call; a forced one that refuses is an error.

    Args:
        call: of the operator.

    Returns:
        The backend. If all that accept the call decline it, the first of them.

    Raises:
        BackendError: no backend accepts the call; the text has every backend's reason.
    """
    return _chosen(call, forced(), BACKENDS)


@lru_cache(maxsize=4096)
def _chosen(call: Call, name: str | None, backends: tuple[Backend, ...]) -> Backend:
    able = [
        backend
        for backend in backends
        if (backend.automatic if name is None else backend.name == name) and backend.refusal(call) is None
    ]
    for backend in able:
        if backend.declines is None or backend.declines(call) is None:
            return backend
    if able:
        return able[0]
    reasons = "; ".join(f"{key}: {why or 'would take it'}" for key, why in refusals(call).items())
    who = "no backend takes" if name is None else f"the forced backend {name!r} does not take"
    way = "" if name is None else f"; for the automatic choice unset {VARIABLE} and call replknet.use_backend(None)"
    raise BackendError(f"{who} this call: {call} ({reasons}){way}")


__all__ = [
    "ALGORITHMS",
    "BACKENDS",
    "Algorithm",
    "Backend",
    "Call",
    "choose",
    "forced",
    "refusals",
    "use_backend",
]
