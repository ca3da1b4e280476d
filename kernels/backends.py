"""Which implementations of a kind of matrix are present. All of them make the same matrix, bit for bit.

"fast-jl" makes another one, so it is no member of these lists and serves only where it is asked for by name.
"""

import functools
import importlib.util
import os

import torch

from . import fast_jl
from .native import native_library

__all__ = ["KINDS", "available_backends", "choose_backend", "require_backend"]

KINDS = ("sparse", "rademacher", "kronecker", "identity")


def available_backends(kind: str, device: str = "cpu") -> tuple[str, ...]:
    """Names of the backends that can serve this kind on this type of device, fastest first.

    "triton" is for GPUs; on the CPU it is there, last, where Triton's interpreter was switched on for tests
    (TRITON_INTERPRET=1 set before triton is imported).

    >>> available_backends("identity")
    ('torch',)
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; known kinds are {', '.join(KINDS)}")
    if kind == "identity":
        return ("torch",)
    if device == "cuda":
        return ("triton", "torch") if _has_triton() else ("torch",)
    if device != "cpu":
        return ("torch",)
    native = () if native_library() is None else ("native",)
    return (*native, "torch", *(("triton",) if _interprets() else ()))


def choose_backend(kind: str, backend: str | None, device: str = "cpu") -> str:
    """The named backend, or for None the fastest one that can work on this type of device.

    Raises:
        ValueError: the backend is not present or cannot work on the device; the message lists those that can.
    """
    able = available_backends(kind, device)
    if backend is None:
        return able[0]
    if backend in able:
        return backend
    if backend == "fast-jl" and kind == "rademacher":
        fast_jl.find_fast_jl()
        return backend
    hint = ""
    if backend == "native" and device == "cpu":
        hint = "; it needs the compiled extension, which was not built"
    if backend == "triton":
        hint = "; it needs the package triton, and tensors on a CUDA device"
    raise ValueError(f"backend {backend!r} cannot serve kind {kind!r} on {device}{hint}; choose one of {able} or None")


def require_backend(kind: str, backend: str | None) -> None:
    """Refuse a backend that no device of this machine could be served by.

    Raises:
        ValueError: as `choose_backend`.
    """
    if backend == "triton" and torch.cuda.is_available():
        choose_backend(kind, backend, "cuda")
    else:
        choose_backend(kind, backend)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interprets() -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1" or not _has_triton():
        return False
    from .triton_device import interpreted

    return interpreted()
