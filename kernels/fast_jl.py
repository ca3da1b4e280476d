"""Adapter to fast_jl, TRAK's dense Rademacher projection on CUDA devices (https://pypi.org/project/fast-jl).

Its matrix is not the one of `rademacher.py`, and no other backend can make it, so it serves only those who ask for it
by name. What version 0.1.3 does, read from its source:

* The signs are a function of its seed, the width of its input and a number of tiles that the caller gives: by its
  convention the device's count of multiprocessors, on which the matrix hence depends. It knows no offset.
* Each (tile, column) pair has an XORWOW stream of its own, and the first words of these streams are correlated. In a
  simulation of its generator with 132 tiles the largest correlation among 512 columns was .25 over 2^16 coordinates,
  .06 over 2^18 and .017 over 2^20, where independent signs give .0045 over 2^20.
* It takes contiguous float32 or float16 of fewer than 2^32 numbers, rounds them to float16, sums in float32, and makes
  a number of columns that 512 divides. It does not look whether its kernel ran: one built for another architecture
  leaves zeros.

Hence the matrix here: block b of 2^20 absolute coordinates has that library's matrix of width 2^20 under a seed drawn
from (seed, b), divided by sqrt(k). A piece of a block is padded with zeros to the whole, so pieces by layer, offset and
batch add up, and every call costs as much as all blocks that it touches: many small layers are dear, and the sparse map
is the better choice for them. Rows are scaled by powers of two to the middle of float16's range and back, so that
neither small nor large gradients are lost; entries below 2^-39 of a row's largest become zero, others keep 11 bits.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .philox import philox4x32

__all__ = [
    "FastJL",
    "fast_jl_add_",
    "fast_jl_add_at_",
    "fast_jl_add_outer_",
    "find_fast_jl",
    "require_fast_jl",
]

BLOCK = 1 << 20  # coordinates that share a seed; see above for what fewer would cost in correlated signs
COLUMNS = 512  # must divide the number of columns

_TAG_BLOCK = 0x464A4C42
_VARIANTS = (8, 16, 32)  # batch sizes that the library has functions for; the matrix is the same
_LARGEST = 15  # a row's largest entry is scaled to [2^14, 2^15): float16 ends at 65504
_SHIFTS = (-126, 126)  # powers of two that float32 holds with their inverse

# block(examples, first coordinate, last coordinate): the numbers to project, (examples, coordinates) of any float type
_Piece = Callable[[slice, int, int], Tensor]


class FastJL(NamedTuple):
    """The library, and the device that it would run on."""

    module: ModuleType | Any
    multiprocessors: int
    device: torch.device


def find_fast_jl(device: torch.device | None = None) -> FastJL:
    """The library and the number of multiprocessors of a CUDA device, by default the current one.

    Raises:
        ValueError: the library is not installed, or the device is not a CUDA device.
    """
    try:
        module = importlib.import_module("fast_jl")
    except ImportError as error:
        raise ValueError(
            f"backend 'fast-jl' needs the package fast_jl, which cannot be imported ({error}): install the extra, "
            'pip install --no-build-isolation "source-proj[fast-jl]", with nvcc of torch\'s CUDA version. Its build '
            "asks for compute_70, which CUDA 13 no longer has: use CUDA 12 or older, or another backend"
        ) from error
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        where = "there is none here" if device is None or device.type == "cuda" else f"the tensors are on {device}"
        raise ValueError(f"backend 'fast-jl' needs a CUDA device, and {where}; move them to one, or take backend=None")
    if device is None or device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return FastJL(module, torch.cuda.get_device_properties(device).multi_processor_count, device)


def require_fast_jl(dim: int, multiprocessors: int | None = None, device: torch.device | None = None) -> FastJL:
    """Look whether the library can make a matrix of dim columns here: before the first call, which would not tell.

    Args:
        dim: columns, k.
        multiprocessors: the count that the matrix was begun with, if it was.
        device: where the tensors are; default: the current CUDA device.

    Raises:
        ValueError: the library or device is missing, lacks functions, or cannot make this matrix; names both values.
    """
    wanted = "" if multiprocessors is None else f"this sketch was made on {multiprocessors} multiprocessors: "
    try:
        found = find_fast_jl(device)
    except ValueError as error:
        raise ValueError(f"{wanted}{error}") from error
    if dim % COLUMNS:
        near = max(COLUMNS, round(dim / COLUMNS) * COLUMNS)
        raise ValueError(f"dim is {dim}, but fast-jl makes multiples of {COLUMNS} columns; give {near}, say")
    missing = [name for name in map(_function, _VARIANTS) if not callable(getattr(found.module, name, None))]
    if missing:
        raise ValueError(f"the fast_jl that is installed lacks {', '.join(missing)}; install fast-jl 0.1.3")
    if multiprocessors is not None and multiprocessors != found.multiprocessors:
        raise ValueError(
            f"{wanted}{found.device} has {found.multiprocessors}, and fast-jl's matrix depends on the number; use a "
            f"device with {multiprocessors} (torch.cuda.set_device chooses among several)"
        )
    return found


def fast_jl_add_(out: Tensor, rows: Tensor, offset: int, *, seed: int, multiprocessors: int | None = None) -> None:
    """Add R[:, offset : offset + n] rows, for rows (B, n) of float32 or float16, to out (B, k) float32, in place.

    Args:
        out: where to add, on a CUDA device.
        rows: the coordinates [offset, offset + n) of B vectors.
        offset: absolute coordinate of the first column of rows.
        seed: which matrix.
        multiprocessors: the count that the matrix was begun with; None: whatever the device has.

    Raises:
        TypeError: another type, which the library lacks; `Sketch` converts to float32 before.
        ValueError: see `require_fast_jl`.
        RuntimeError: the kernel did not run, or made zeros or what is not finite; names the likely cause.
    """
    _require_type("rows", rows)
    _add_(out, rows.shape[1], offset, lambda some, first, last: rows[some, first:last], seed, multiprocessors)


def fast_jl_add_outer_(
    out: Tensor, left: Tensor, right: Tensor, offset: int, *, seed: int, multiprocessors: int | None = None
) -> None:
    """Add R vec(sum_t left_t (x) right_t), left (B, T, o) and right (B, T, i), to out (B, k); as `fast_jl_add_`."""
    _require_type("left", left)
    _require_type("right", right)
    i = right.shape[2]

    def piece(some: slice, first: int, last: int) -> Tensor:
        above, below = first // i, -(-last // i)  # whole rows of the weight that cover the coordinates
        tile = torch.bmm(left[some, :, above:below].transpose(1, 2), right[some])  # (b, h, i)
        return tile.flatten(1)[:, first - above * i : last - above * i]

    _add_(out, left.shape[2] * i, offset, piece, seed, multiprocessors)


def fast_jl_add_at_(
    out: Tensor, rows: Tensor, examples: Tensor, offsets: Tensor, *, seed: int, multiprocessors: int | None = None
) -> None:
    """Add R[:, offsets[r] : offsets[r] + n] rows[r] to out[examples[r]] for every r; as `fast_jl_add_`.

    All rows of an example within one block are gathered first, so that each block is projected once.
    """
    _require_type("rows", rows)
    library = require_fast_jl(out.shape[1], multiprocessors, out.device)
    places = offsets.unsqueeze(1) + torch.arange(rows.shape[1], device=rows.device)  # (M, n)
    blocks = places // BLOCK
    for block in torch.unique(blocks).tolist():
        row, column = (blocks == block).nonzero(as_tuple=True)
        owner, place, value = examples[row], places[row, column] - block * BLOCK, rows[row, column].float()
        present = torch.unique(owner)
        for group in present.split(_VARIANTS[-1]):
            here = torch.isin(owner, group)
            padded = torch.zeros(len(group), BLOCK, dtype=torch.float32, device=out.device)
            line = torch.searchsorted(group, owner[here])
            padded.view(-1).index_add_(0, line * BLOCK + place[here], value[here])
            out.index_add_(0, group, _project(library, padded, _block_seed(seed, block), out.shape[1]))


def _add_(out: Tensor, count: int, offset: int, piece: _Piece, seed: int, multiprocessors: int | None) -> None:
    """Add the projection of count coordinates from offset on, block by block and 32 examples at a time."""
    batch, dim = out.shape
    library = require_fast_jl(dim, multiprocessors, out.device)
    for block in range(offset // BLOCK, -(-(offset + count) // BLOCK)):
        first, last = max(offset, block * BLOCK), min(offset + count, (block + 1) * BLOCK)
        inside = slice(first - block * BLOCK, last - block * BLOCK)
        for start in range(0, batch, _VARIANTS[-1]):  # 32 x 2^20 numbers: far from the 2^32 that the library can index
            some = slice(start, min(start + _VARIANTS[-1], batch))
            padded = torch.zeros(some.stop - start, BLOCK, dtype=torch.float32, device=out.device)
            padded[:, inside] = piece(some, first - offset, last - offset)
            out[some] += _project(library, padded, _block_seed(seed, block), dim)


def _project(library: FastJL, block: Tensor, seed: int, dim: int) -> Tensor:
    """The block's matrix times rows (b, 2^20), which are overwritten, checked: (b, k) float32."""
    size = block.abs().amax(dim=1, keepdim=True)
    finite = size.isfinite()
    shift = (_LARGEST - torch.frexp(torch.where(finite, size, 0.0)).exponent).clamp(*_SHIFTS)
    block.mul_(_power_of_two(shift))
    variant = next((one for one in _VARIANTS if len(block) <= one), _VARIANTS[-1])
    try:
        made = _launch(getattr(library.module, _function(variant)), block, dim, seed, library.multiprocessors)
        zero = (made == 0).all(dim=1) & (size[:, 0] > 0) & finite[:, 0]
        wrong = ~made.isfinite().all(dim=1) & finite[:, 0]
        failures = torch.stack([zero.any(), wrong.any()]).tolist()
    except RuntimeError as error:
        raise RuntimeError(f"fast_jl.{_function(variant)} failed on {library.device}: {error}; {_CAUSE}") from error
    if failures[0]:
        rows = zero.nonzero().flatten().tolist()
        raise RuntimeError(f"fast_jl.{_function(variant)} made zeros only of rows {rows}, which are not zero: {_CAUSE}")
    if failures[1]:
        rows = wrong.nonzero().flatten().tolist()
        raise RuntimeError(
            f"fast_jl.{_function(variant)} made what is not finite of rows {rows}, which are finite: {_CAUSE}"
        )
    # What was not finite stays so, for the caller to name the example.
    return torch.where(finite, made.float() * _power_of_two(-shift) * dim**-0.5, torch.nan)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32 from its bits: exact on every device, for int32 from -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)


_CAUSE = (
    "most likely it was built for another architecture than this device's, or its kernel wants more registers than the "
    "device has. Build fast-jl again with the device's own architecture in TORCH_CUDA_ARCH_LIST, or take backend=None"
)


def _launch(function: Callable[..., Tensor], block: Tensor, dim: int, seed: int, tiles: int) -> Tensor:
    """Call the library, which launches on the current device's default stream whatever torch's current stream is."""
    if not block.is_cuda:  # a stand-in
        return function(block, dim, seed, tiles)
    with torch.cuda.device(block.device):
        current, default = torch.cuda.current_stream(), torch.cuda.default_stream()
        default.wait_stream(current)
        with torch.cuda.stream(default):
            made = function(block, dim, seed, tiles)
        current.wait_stream(default)
        made.record_stream(current)
    return made


def _block_seed(seed: int, block: int) -> int:
    return int(philox4x32(block & 0xFFFFFFFF, block >> 32, 0, _TAG_BLOCK, seed=seed)[0])


def _function(variant: int) -> str:
    return f"project_rademacher_{variant}"


def _require_type(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float16):
        raise TypeError(
            f"{name} is {x.dtype}; fast-jl takes torch.float32 and torch.float16, and rounds to float16 itself: "
            "convert with .float(), as Sketch does"
        )
