"""Pictures as inline ``data:`` addresses, so that a page needs no other file."""

import base64
import io
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["image_uri"]


def image_uri(value: Any) -> str | None:
    """Encode a picture as a ``data:image/png;base64,…`` address; anything that is no picture gives None.

    Floating-point pictures are stretched from their own minimum and maximum to the full range, so normalised inputs
    look right; integer ones are taken as 0 to 255 where they fit and stretched otherwise.

    Args:
        value: array or tensor ``(H, W)``, ``(1, H, W)``, ``(3, H, W)``, ``(H, W, 1)`` or ``(H, W, 3)``, or a Pillow
            image.

    Raises:
        ImportError: without Pillow (extra ``demo``).

    Example:
        >>> image_uri(np.zeros((8, 8)))[:22]
        'data:image/png;base64,'
        >>> image_uri("a sentence") is None
        True
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('pictures need Pillow: pip install "source-proj[demo]"') from error
    if isinstance(value, Image.Image):
        return _png(value if value.mode in ("L", "RGB", "RGBA") else value.convert("RGB"))
    pixels = _pixels(value)
    return None if pixels is None else _png(Image.fromarray(pixels))


def _pixels(value: Any) -> np.ndarray | None:
    """Bring an array to ``(H, W)`` or ``(H, W, 3)`` uint8; None for anything else."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy() if value.is_floating_point() else value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray) or value.size == 0 or value.dtype.kind not in "biuf":
        return None
    if value.ndim == 3 and value.shape[0] in (1, 3) and value.shape[2] not in (1, 3):
        value = np.moveaxis(value, 0, -1)
    if value.ndim == 3 and value.shape[2] == 1:
        value = value[:, :, 0]
    if value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3):
        return _bytes(value)
    return None


def _bytes(value: np.ndarray) -> np.ndarray:
    if value.dtype.kind in "biu" and value.dtype.kind != "b" and value.min() >= 0 and value.max() <= 255:
        return np.ascontiguousarray(value.astype(np.uint8))
    value = np.nan_to_num(value.astype(np.float64))
    low, high = float(value.min()), float(value.max())
    scaled = (value - low) * (255.0 / (high - low)) if high > low else np.zeros_like(value)
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8))


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
