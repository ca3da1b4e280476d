"""What the sketch's Triton kernels share: signs, one block of the sparse map, and partial sums added in order.

The functions are compiled into the kernels of the modules beside this one. With TRITON_INTERPRET=1 set before triton is
imported they run on the CPU, for tests. Launches say that products and sums may be fused, since the default changes
between versions of triton, and with it the last bits.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Concatenate, ParamSpec

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "add_block",
    "add_partials_",
    "ceil_div",
    "columns_width",
    "interpreted",
    "negative_words",
    "on_device",
    "product",
    "signed_by",
    "signed_each",
    "source_of_columns",
    "split_seed",
]

_Others = ParamSpec("_Others")

_SIGN: tl.constexpr = tl.constexpr(0x5349474E)  # TAG_SIGN of sparse_map.py


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes tensors in main memory."""
    return not isinstance(add_block, triton.JITFunction)


def on_device(function: Callable[Concatenate[Tensor, _Others], None]) -> Callable[Concatenate[Tensor, _Others], None]:
    """With the device of the first argument as the current one: that is where triton launches."""

    @functools.wraps(function)
    def wrapped(out: Tensor, /, *others: _Others.args, **options: _Others.kwargs) -> None:
        with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
            function(out, *others, **options)

    return wrapped


def split_seed(seed: int) -> tuple[int, int]:
    """The two halves of a seed as signed 32-bit numbers, so that a kernel's argument has one type for all seeds."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def ceil_div(a: int, b: int) -> int:
    """Quotient rounded up; triton's own takes microseconds on the host."""
    return -(-a // b)


def columns_width(dim: int) -> int:
    """The power of two, at least 128, that holds k columns."""
    return max(128, 1 << (dim - 1).bit_length())


@triton.jit
def negative_words(low, high, third, fourth, key0, key1):
    """Philox4x32-10 for tensors of 64-bit counters given as two uint32 halves; four words."""
    # A key that happens to be 1 arrives as a constant of the compiler, which has no bits to cast before it is a tensor.
    k0 = tl.cast(key0, tl.int32).to(tl.uint32, bitcast=True)
    k1 = tl.cast(key1, tl.int32).to(tl.uint32, bitcast=True)
    return tl.philox_impl(low, high, low * 0 + third, low * 0 + fourth, k0, k1)


@triton.jit
def product(a, b, sums, WIDEN: tl.constexpr):
    """Sums plus a @ b; WIDEN is for the interpreter, which takes the bits of bfloat16 operands for integers."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _negative_each(coordinate, copy, key0, key1):
    """1 where the sign of a coordinate (int64) is negative, else 0, with a call of Philox for each of them: uint32."""
    group = coordinate // 128
    w0, w1, w2, w3 = negative_words(
        (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32), copy, _SIGN, key0, key1
    )
    bit = (coordinate % 128).to(tl.uint32)
    word = tl.where(bit < 64, tl.where(bit < 32, w0, w1), tl.where(bit < 96, w2, w3))
    return (word >> (bit % 32)) & 1


@triton.jit
def signed_each(x, coordinate, copy, key0, key1):
    """Numbers x float32 with the signs of their coordinates, int64 and in any order."""
    flip = _negative_each(coordinate, copy, key0, key1) << 31
    return (x.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)


@triton.jit
def _negative(start, copy, key0, key1, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """1 where the sign of coordinate start + j is negative, else 0: (WIDTH,) uint32.

    Of a start that 128 divides, one call of Philox serves 128 coordinates; else every coordinate has one of its own.
    """
    start = tl.cast(start, tl.int64)
    if ALIGNED:
        group = start // 128 + tl.arange(0, WIDTH // 128)
        w0, w1, w2, w3 = negative_words(
            (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32), copy, _SIGN, key0, key1
        )
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (WIDTH // 32,))  # w0, w1, w2, w3 of each group
        bits = (words[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
        return tl.reshape(bits, (WIDTH,))
    return _negative_each(start + tl.arange(0, WIDTH), copy, key0, key1)


@triton.jit
def add_block(
    sums, x, start, multiplier, shift, copy, key0, key1, K: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr
):
    """Sums (E, WIDTH) plus a block's inputs x (E, WIDTH) float32 with their signs, at their columns.

    Column j gets coordinate (multiplier j + shift) mod K: the inverse of the block's permutation. Signs are put on in
    the inputs' order, where Philox is cheap. The gather goes through shared memory; with K a power of two the
    multiplier is odd, so that neighbouring columns read from different banks. This takes a gather in a tensor of
    one axis: with two, triton 3.9 made ten thousands of shuffles and spills of it, as `examples/speed/compiled.py`
    shows.
    """
    flip = _negative(start, copy, key0, key1, WIDTH, ALIGNED) << 31
    signed = (x.to(tl.uint32, bitcast=True) ^ flip[None, :]).to(tl.float32, bitcast=True)
    column = tl.arange(0, WIDTH).to(tl.uint32)
    source = ((multiplier.to(tl.uint32) * column + shift.to(tl.uint32)) % K).to(tl.int32)
    flat = tl.reshape(signed, (signed.shape[0] * WIDTH,))
    example = tl.arange(0, signed.shape[0])[:, None] * WIDTH
    source = tl.reshape(example + source[None, :], (signed.shape[0] * WIDTH,))
    return sums + tl.reshape(tl.gather(flat, source, 0), signed.shape)


@triton.jit
def signed_by(x, entry, row):
    """X float32 with the product of the signs in bit 31 of two entries of a tensor map's tables."""
    flip = (entry ^ row).to(tl.uint32, bitcast=True) >> 31 << 31
    return (x.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)


@functools.lru_cache(maxsize=1 << 13)  # tables are kept by their maps, and so are these
def source_of_columns(entries: Tensor, dim: int) -> Tensor:
    """For each block and column the entry of the block that goes there, 0 to k - 1, (blocks k,) int32."""
    blocks = []
    for start in range(0, len(entries), dim):
        columns = (entries[start : start + dim] & 0x7FFFFFFF).long()
        inverse = torch.full((dim,), dim, dtype=torch.int32, device=entries.device)
        inverse[columns] = torch.arange(len(columns), dtype=torch.int32, device=entries.device)
        # Columns that no entry has take those entries of the block that are not there.
        holes = inverse == dim
        inverse[holes] = torch.arange(len(columns), dim, dtype=torch.int32, device=entries.device)
        blocks.append(inverse)
    return torch.cat(blocks)


@triton.jit
def _add_partials_kernel(out, partials, out_stride, parts, size, dim, scale, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(parts):
        total += tl.load(partials + place, mask=there, other=0.0)
        partials += size
    at = out + place // dim * out_stride + place % dim
    tl.store(at, tl.load(at, mask=there, other=0.0) + total * scale, mask=there)


def add_partials_(out: Tensor, partials: Tensor, scale: float) -> None:
    """Add scale times the sum over parts of partials (parts, B, k), one after the other, to out (B, k)."""
    parts, batch, dim = partials.shape
    block = 1 << 16 if interpreted() else 1024  # the interpreter's time goes by programs
    grid = (ceil_div(batch * dim, block),)
    _add_partials_kernel[grid](
        out, partials, out.stride(0), parts, batch * dim, dim, scale, BLOCK=block, enable_fp_fusion=True
    )
