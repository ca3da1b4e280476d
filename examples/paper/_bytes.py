"""The laboratory's study (l) as a figure: LDS against the bytes of a row, a panel a task, a line a codec."""

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from _pictures import save_picture
from matplotlib.figure import Figure

__all__ = ["draw_bytes"]

COLOURS = {"float32": "#8a949c", "int8": "#1d2327", "int4": "#0b6e66", "int2": "#a83c0c", "int1": "#5a4fa0"}
_SPREAD = 1.035  # of the codecs' points, so that their intervals lie beside each other


def draw_bytes(studies: pd.DataFrame, titles: Mapping[str, str], path: Path) -> None:
    """Write the figure.

    Args:
        studies: lines of all studies; those of (l) are named "512 bytes, int4, k = 1,024".
        titles: names of the tasks, in their order.
        path: the PNG.
    """
    lines = studies[studies["study"] == "l"]
    tasks = [task for task in titles if task in set(lines["task"])]
    figure = Figure(figsize=(3.6 * len(tasks), 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = lines[lines["task"] == task].copy()
        own["bytes"] = [int(re.sub(r"\D", "", variant.split(" bytes")[0])) for variant in own["variant"]]
        own["codec"] = [variant.split(", ")[-2] for variant in own["variant"]]
        for place, (codec, colour) in enumerate(COLOURS.items()):
            points = own[own["codec"] == codec].sort_values("bytes")
            spread = _SPREAD ** (place - 2)
            axes.errorbar(
                points["bytes"] * spread, points["lds"],
                yerr=(points["lds"] - points["low"], points["high"] - points["lds"]),
                color=colour, label=codec, marker="o", markersize=3.5, linewidth=1.4, elinewidth=0.7,
            )  # fmt: skip
        ticks = sorted(set(own["bytes"]))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_title(titles[task], fontsize=10)
        axes.set_xlabel("bytes a row and checkpoint", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("LDS (mean over runs, 95 % interval)", fontsize=9)
    figure.axes[0].legend(frameon=False, fontsize=8)
    save_picture(figure, path)
