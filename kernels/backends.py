"""Which implementations are present. All of them make the same matrix, bit for bit.

"fast-jl" makes another one, so it is no member of these lists and serves only where it is asked for by name.
"""

import functools
import importlib.util
import os

from .native import native_library

__all__ = ["BACKENDS", "available_backends", "choose_backend"]

BACKENDS = ("native", "triton", "torch")


def available_backends(device: str = "cpu") -> tuple[str, ...]:
    """Names of the backends that can serve tensors on this type of device, fastest first.

    "triton" is for GPUs; on the CPU it is there, last, where Triton's interpreter was switched on for tests
    (TRITON_INTERPRET=1 set before triton is imported).

    >>> "torch" in available_backends()
    True
    """
    if device == "cuda":
        return ("triton", "torch") if _has_triton() else ("torch",)
    if device != "cpu":
        return ("torch",)
    native = () if native_library() is None else ("native",)
    return (*native, "torch", *(("triton",) if _interprets() else ()))


def choose_backend(
    backend: str | None, device: str = "cpu", among: tuple[str, ...] = BACKENDS, what: str = "tensors"
) -> str:
    """The named backend, or for None the fastest one that can work on this type of device.

    Args:
        backend: its name, or None.
        device: type of the device.
        among: names of those that were written for the purpose.
        what: the purpose, for the error.

    Raises:
        ValueError: the backend is not present or cannot work on the device; the message lists those that can.
    """
    able = tuple(name for name in available_backends(device) if name in among)
    if backend is None:
        return able[0]
    if backend in able:
        return backend
    hint = ""
    if backend == "native" and device == "cpu":
        hint = "; it needs the compiled extension, which was not built"
    if backend == "triton":
        hint = "; it needs the package triton, and tensors on a CUDA device"
    raise ValueError(f"backend {backend!r} cannot serve {what} on {device}{hint}; choose one of {able} or None")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interprets() -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1" or not _has_triton():
        return False
    from .triton_device import interpreted

    return interpreted()
