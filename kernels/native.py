"""Loads the compiled kernels of native.c, where they were built, and shares work among threads."""

import ctypes
import functools
import importlib.util
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "PANEL",
    "Addition",
    "NativeMap",
    "NativeProduct",
    "aligned_scratch",
    "give_back",
    "native_library",
    "require_library",
    "run_additions",
    "run_jobs",
    "share_rows",
    "taken",
]

PANEL = 16  # examples whose rows are added to by all before the next ones: they stay in the second-level cache
_VERSION = 15
_ALIGNMENT = 64  # bytes, as the widest vectors want it
_SPARE, _MOST_SPARE = 2, 1 << 22  # pieces of memory that `taken` finds again, and their numbers at most
_WORTH_THREADS = 100_000  # nanoseconds of work below which waking another thread costs more than it saves

_pointer, _int, _i64, _u32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32
_u64, _float = ctypes.c_uint64, ctypes.c_float


class NativeMap(ctypes.Structure):
    """Which matrix, as native.c takes it: the sparse map, or where `left` and `right` are given, a tensor map.

    Args:
        dim: columns, k.
        seed: of the sparse map.
        nnz: copies of the sparse map.
        offset: first coordinate of a tensor map's parameter.
        left: (o,) int32, whose bits are columns and signs of the tensor map's first axis; contiguous.
        right: (i,) likewise of its second axis.
    """

    _fields_ = (
        ("seed", _u64), ("base", _u64), ("width", _u64), ("left", _pointer), ("right", _pointer), ("k", _u32),
        ("nnz", _u32),
    )  # fmt: skip

    k: int
    nnz: int

    def __init__(
        self,
        dim: int,
        seed: int = 0,
        nnz: int = 1,
        offset: int = 0,
        left: Tensor | None = None,
        right: Tensor | None = None,
    ) -> None:
        if left is None or right is None:
            super().__init__(seed, 0, 0, None, None, dim, nnz)
            return
        super().__init__(seed, offset, len(right), left.data_ptr(), right.data_ptr(), dim, nnz)
        self._kept = left, right  # as long as the addresses are in use


class NativeProduct(ctypes.Structure):
    """An outer product sum_t left_t (x) right_t under a map, as native.c takes it.

    Args:
        left: (B, T, o) float32, its last axis contiguous.
        right: (B, T, i) likewise.
        matrix: the map of its coordinates.
    """

    _fields_ = (
        ("left", _pointer), ("right", _pointer), ("left_b", _i64), ("left_t", _i64), ("right_b", _i64),
        ("right_t", _i64), ("steps", _i64), ("o", _i64), ("i", _i64), ("matrix", NativeMap),
    )  # fmt: skip

    steps: int
    o: int
    i: int

    def __init__(self, left: Tensor, right: Tensor, matrix: NativeMap) -> None:
        (_, steps, o), i = left.shape, right.shape[2]
        super().__init__(
            *(left.data_ptr(), right.data_ptr(), *left.stride()[:2], *right.stride()[:2], steps, o, i, matrix),
        )
        self.kept = left, right, matrix  # as long as the addresses are in use


_map = ctypes.POINTER(NativeMap)
_SIGNATURES = {
    "sp_table": [_pointer, _u64, _i64, _map, _u32],
    "sp_signs": [_pointer, _u64, _i64, _i64, _u64, _u32],
    "sp_add_rows": [_pointer, _i64, _pointer, _i64, _i64, _i64, _u64, _map, _float],
    "sp_add_at": [
        *(_pointer, _i64, _pointer, _i64, _i64, _i64, _pointer, _pointer),
        *(_i64, _i64, _map, _float),
    ],
    "sp_add_lanes": [_pointer, _pointer, _i64, _int, _i64, _u64, _map],
    "sp_gather_lanes": [_pointer, _i64, _pointer, _i64, _int, _i64, _float],
    "sp_windows_lanes": [
        *(_pointer, _pointer, _i64, _i64, _pointer, _i64, _i64, _pointer, _i64, _i64, _pointer, _pointer),
        *(_int, _i64, _i64, _i64, _i64, _u64, _map, _pointer),
    ],
    "sp_spectral_outer": [
        *(_pointer, _pointer, _int, _pointer, _i64, _i64, _pointer, _i64, _i64),
        *(_i64, _i64, _i64, _i64, _i64, _map, _pointer),
    ],
    "sp_spectral_windows": [
        *(_pointer, _pointer, _int, _pointer, _i64, _i64, _pointer, _i64, _i64, _pointer, _pointer),
        *(_i64, _i64, _i64, _i64, _i64, _i64, _i64, _pointer, _map, _pointer),
    ],
    "sp_spectral_table": [_pointer, _pointer, _i64],
    "sp_finish": [*(_pointer, _i64, _pointer, _pointer, _pointer, _i64), *(_i64, _i64, _i64, _pointer)],
    "sp_products": [
        *(_pointer, _i64, _pointer, _pointer, _pointer, _pointer, _i64, _i64, _i64, _i64, _pointer, _pointer, _i64),
    ],
    "sp_score": [_pointer, _i64, _pointer, _i64, _i64, _pointer, _i64, _pointer, _i64, _i64, _int],
    "sp_gram": [*(_pointer, _i64, _pointer, _i64, _pointer, _i64), *(_pointer, _i64, _int, _pointer)],
    "sp_gram_integer": [*(_pointer, _i64, _pointer, _i64, _pointer, _i64), *(_pointer, _i64, _pointer)],
    "sp_keep": [
        *(_pointer, _pointer, _pointer, _pointer, _i64),
        *(_pointer, _i64, _pointer, _i64, _i64, _i64, _float, _pointer),
    ],
    "sp_best": [
        *(_pointer, _pointer, _pointer, _pointer, _i64, _pointer, _i64, _i64, _pointer, _i64, _pointer),
        *(_i64, _i64, _int, _i64, _float, _pointer),
    ],
    "sp_merge": [*(_pointer, _pointer, _pointer, _pointer, _i64, _i64), *(_pointer, _pointer, _pointer, _i64)],
    "sp_rotate": [_pointer, _pointer, _pointer, _i64, _i64, _i64, _pointer, _pointer, _int],
    "sp_encode": [*(_pointer, _i64, _pointer, _pointer, _pointer, _i64), *(_i64, _i64, _int, _pointer, _pointer)],
    "sp_unpack": [_pointer, _i64, _pointer, _i64, _i64, _i64, _int, _pointer],
    "sp_nibbles": [_pointer, _i64, _pointer, _i64, _i64, _i64, _int, _pointer],
    "sp_outer_lanes": [
        *(_pointer, _pointer, _pointer, _i64, _i64, _pointer, _i64, _i64),
        *(_int, _i64, _i64, _i64, _u64, _map, _pointer),
    ],
}


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the package was installed without a compiler."""
    found = importlib.util.find_spec(f"{__package__}._native")
    if found is None or found.origin is None:
        return None
    library = ctypes.CDLL(found.origin)
    version = ctypes.c_int.in_dll(library, "sp_version").value
    if version != _VERSION:
        warnings.warn(
            f"the compiled kernels are of version {version}, the package of {_VERSION}: "
            "the slower torch backend serves until the package is installed again",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    library.sp_outer_work.restype = _i64
    return library


def require_library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        RuntimeError: they are not there.
    """
    library = native_library()
    if library is None:
        raise RuntimeError("the compiled kernels are not there; use backend 'torch'")
    return library


_local = threading.local()


def aligned_scratch(name: str, count: int) -> Tensor:
    """Memory of this thread for count float32 numbers, at an address that 64 divides, kept from call to call.

    Fresh memory is costly: the kernel must clear every page of it.
    """
    kept: Tensor | None = getattr(_local, name, None)
    if kept is None or kept.numel() < count:
        kept = _aligned(count)
        setattr(_local, name, kept)
    return kept[:count]


def taken(count: int) -> Tensor:
    """Memory as of `aligned_scratch`, but the caller's alone until it calls `give_back`."""
    spare: list[Tensor] = getattr(_local, "spare", [])
    fits = [n for n, memory in enumerate(spare) if memory.numel() >= count]
    return spare.pop(fits[0]) if fits else _aligned(count)


def give_back(memory: Tensor) -> None:
    """Let the next caller of `taken` in this thread have this; a few are kept."""
    spare: list[Tensor] = getattr(_local, "spare", [])
    if memory.numel() <= _MOST_SPARE:
        _local.spare = [memory, *spare][:_SPARE]


def _aligned(count: int) -> Tensor:
    memory = torch.empty(count + _ALIGNMENT // 4, dtype=torch.float32, device="cpu")
    skip = -memory.data_ptr() % _ALIGNMENT // 4
    return memory[skip : skip + count]


_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None  # its threads do not live on in a forked process


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def run_jobs(jobs: Sequence[Callable[[], None]], nanoseconds: float) -> None:
    """Run jobs of about so many nanoseconds in all, on up to torch.get_num_threads() threads, this one among them.

    Which thread does which job is left open, so jobs must not share outputs. They may not call torch operators that
    use threads of their own.
    """
    global _pool
    workers = min(torch.get_num_threads(), len(jobs))
    if workers <= 1 or nanoseconds < _WORTH_THREADS:
        for job in jobs:
            job()
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(max(os.cpu_count() or 1, workers), thread_name_prefix="sketch")
    tickets = itertools.count()  # next() of it is atomic

    def work() -> None:
        while (ticket := next(tickets)) < len(jobs):
            jobs[ticket]()

    helpers = [_pool.submit(work) for _ in range(workers - 1)]
    try:
        work()
    finally:  # the outputs belong to the caller again only when nobody writes to them
        wait(helpers)
    for helper in helpers:
        helper.result()


class Addition(NamedTuple):
    """What adds something to rows [first, last) of an output, taking so long for all rows.

    Attributes:
        add: called with first and last.
        nanoseconds: about.
        memory: that it reads, of `taken`; given back in the end.
    """

    add: Callable[[int, int], None]
    nanoseconds: float
    memory: Tensor | None = None


def run_additions(rows: int, *additions: Addition | None) -> None:
    """Run all that there are on all rows, one after the other on the same few rows; see `run_jobs`."""
    present = [addition for addition in additions if addition is not None]

    def some(first: int) -> None:
        for addition in present:
            addition.add(first, min(first + PANEL, rows))

    if present:
        jobs = [functools.partial(some, first) for first in range(0, rows, PANEL)]
        run_jobs(jobs, sum(addition.nanoseconds for addition in present))
    for addition in present:
        if addition.memory is not None:
            give_back(addition.memory)


def share_rows(rows: int, some: Callable[[int, int], None], nanoseconds: float) -> None:
    """Call some(first, last) on ranges that cover all rows, which must not depend on each other; see `run_jobs`."""
    threads = torch.get_num_threads()
    share = rows if threads == 1 or nanoseconds < _WORTH_THREADS else -(-rows // min(rows, 2 * threads))
    run_jobs([functools.partial(some, row, min(row + share, rows)) for row in range(0, rows, share)], nanoseconds)
