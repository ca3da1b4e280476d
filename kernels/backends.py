"""Which implementations of a kind of matrix are present. All of them make the same matrix, bit for bit.

"fast-jl" makes another one, so it is no member of these lists and serves only where it is asked for by name.
"""

from . import fast_jl
from .native import native_library

__all__ = ["KINDS", "available_backends", "choose_backend"]

KINDS = ("sparse", "rademacher", "kronecker", "identity")


def available_backends(kind: str) -> tuple[str, ...]:
    """Names of the backends that can serve this kind here, fastest first.

    >>> available_backends("identity")
    ('torch',)
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; known kinds are {', '.join(KINDS)}")
    if kind == "identity" or native_library() is None:
        return ("torch",)
    return ("native", "torch")


def choose_backend(kind: str, backend: str | None, device: str = "cpu") -> str:
    """The named backend, or for None the fastest one that can work on this type of device.

    Raises:
        ValueError: the backend is not present or cannot work on the device; the message lists those that can.
    """
    able = tuple(name for name in available_backends(kind) if device == "cpu" or name != "native")
    if backend is None:
        return able[0]
    if backend in able:
        return backend
    if backend == "fast-jl" and kind == "rademacher":
        fast_jl.find_fast_jl()
        return backend
    hint = "; it needs the compiled extension, which was not built" if backend == "native" and device == "cpu" else ""
    raise ValueError(f"backend {backend!r} cannot serve kind {kind!r} on {device}{hint}; choose one of {able} or None")
