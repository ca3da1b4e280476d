"""Pictures that are small enough to be committed: a PNG with a palette instead of a colour a pixel."""

import io
from pathlib import Path

import _above  # noqa: F401
from _data import write_whole
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["save_picture"]


def save_picture(figure: Figure, path: Path, *, dpi: int = 120, colours: int = 48) -> None:
    """Write a figure as a PNG of few colours, whole or not at all: about a quarter of the bytes of true colours.

    The palette is made from the picture (median cut, then k-means, without which thin coloured lines and small coloured
    letters turn grey); nothing is dithered, so that flat areas stay flat and compress.
    """
    full, small = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(full, dpi=dpi, format="png", facecolor="white")
    picture = Image.open(full).convert("RGB").quantize(colours, kmeans=3, dither=Image.Dither.NONE)
    picture.save(small, format="PNG", optimize=True)
    write_whole(path, small.getvalue())
