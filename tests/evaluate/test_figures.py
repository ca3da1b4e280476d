import re
import subprocess
import sys

import numpy as np
import pytest

from source_proj.evaluate import (
    calibration,
    half_subsets,
    lds,
    leave_one_out,
    mislabel,
    plot_calibration,
    plot_inspection,
    plot_lds,
    plot_removal,
    subset_removal,
    table,
)

rng = np.random.default_rng(0)
MASKS, EFFECT = half_subsets(30, 24), rng.normal(size=(3, 30))
OUTCOMES = (MASKS @ EFFECT.T)[:, None] + rng.normal(size=(24, 3, 3))
LDS = {name: lds(EFFECT + s * rng.normal(size=(3, 30)), MASKS, OUTCOMES) for name, s in [("good", 0.1), ("poor", 3.0)]}
NOISY = np.arange(20) % 4 == 0
MISLABEL = {name: mislabel(NOISY + s * rng.normal(size=20), NOISY) for name, s in [("sharp", 0.2), ("blunt", 2.0)]}


def train(kept, seed):
    return (EFFECT[:, kept].sum(1) > EFFECT.sum(1) - 3).astype(int)


REMOVAL = {
    name: subset_removal(scores, [1, 1, 1], train, [1, 3, 9], progress=False)
    for name, scores in [("SOURCE", EFFECT), ("other", rng.normal(size=(3, 30)))]
}
RESULTS = {"plot_lds": LDS, "plot_inspection": MISLABEL, "plot_removal": REMOVAL}
PLOTS = {"plot_lds": plot_lds, "plot_inspection": plot_inspection, "plot_removal": plot_removal}


@pytest.fixture(autouse=True)
def _matplotlib():
    pytest.importorskip("matplotlib")


def texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_lds_bars_stand_at_the_values_the_first_on_top():
    figure = plot_lds(LDS)
    (axes,) = figure.axes
    bars = axes.patches
    assert [bar.get_width() for bar in bars] == [one.value for one in LDS.values()]
    middle = [bar.get_y() + bar.get_height() / 2 for bar in bars]
    assert middle[0] > middle[1]
    labels = dict(zip(axes.get_yticks(), (label.get_text() for label in axes.get_yticklabels()), strict=True))
    assert [labels[round(place)] for place in middle] == ["good", "poor"]
    intervals, ceilings = axes.collections
    for place, one, interval, ceiling in zip(
        middle, LDS.values(), intervals.get_segments(), ceilings.get_segments(), strict=True
    ):
        np.testing.assert_allclose(interval, [[one.interval[0], place], [one.interval[1], place]])
        np.testing.assert_allclose(ceiling, [[one.ceiling, place - 0.5], [one.ceiling, place + 0.5]])
    assert texts(axes) == ["95 % interval", "noise ceiling"]


def test_no_ceiling_no_mark():
    axes = plot_lds({"one": lds(EFFECT, MASKS, OUTCOMES[:, 0], bootstrap=0)}).axes[0]
    assert texts(axes) == ["95 % interval"]


def test_removal_lines_and_bands():
    axes = plot_removal(REMOVAL).axes[0]
    assert texts(axes) == ["SOURCE", "other"]
    for line, band, one in zip(axes.lines, axes.collections, REMOVAL.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([[1, 3, 9], one.fraction], axis=1))
        corners = band.get_paths()[0].vertices
        for size, (low, high) in zip([1, 3, 9], one.interval, strict=True):
            heights = corners[corners[:, 0] == size, 1]
            assert (heights.min(), heights.max()) == (low, high)


def test_inspection_curves_and_the_diagonal():
    axes = plot_inspection(MISLABEL).axes[0]
    for line, one in zip(axes.lines, MISLABEL.values(), strict=False):
        np.testing.assert_allclose(line.get_xydata(), np.stack([np.arange(21) / 20, one.found], axis=1))
    np.testing.assert_array_equal(axes.lines[-1].get_xydata(), [[0, 0], [1, 1]])
    assert texts(axes) == [*(f"{name}, AUC {one.auc:.3f}" for name, one in MISLABEL.items()), "chance"]


def test_calibration_points_slope_and_the_line_one():
    axes = plot_calibration(EFFECT, MASKS, OUTCOMES).axes[0]
    found = calibration(EFFECT, MASKS, OUTCOMES)
    points = np.asarray(axes.collections[0].get_offsets()).reshape(3, 24, 2)  # (query, subset, coordinate)
    sums = MASKS @ EFFECT.T
    np.testing.assert_allclose(points[..., 0], (sums - sums.mean(0)).T)
    means = OUTCOMES.mean(1)
    np.testing.assert_allclose(points[..., 1], (means - means.mean(0)).T)
    one, fitted = (np.diff(line.get_xydata(), axis=0)[0] for line in axes.lines)
    assert one[1] / one[0] == pytest.approx(1)
    assert fitted[1] / fitted[0] == pytest.approx(found.slope)
    low, high = found.interval
    assert texts(axes) == ["slope 1", f"slope {found.slope:.2f} [{low:.2f}, {high:.2f}]"]


@pytest.mark.parametrize("name", PLOTS)
def test_given_axes_are_drawn_into_and_figures_can_be_saved(tmp_path, name):
    from matplotlib.figure import Figure

    figure = Figure()
    inner, outer = figure.subfigures(1, 2)
    for part in (inner, outer):
        assert PLOTS[name](RESULTS[name], axes=part.subplots()) is figure
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        PLOTS[name]({})


def test_table_holds_what_each_result_has():
    pytest.importorskip("pandas")
    drops = np.vstack([np.ones(30, bool), ~np.eye(30, dtype=bool)])
    left_out = leave_one_out(EFFECT, drops, drops @ EFFECT.T)
    found = table({"ours": LDS["good"], "loss": MISLABEL["sharp"], "removed": REMOVAL["SOURCE"], "loo": left_out})
    assert list(found.columns) == ["measure", "removed", "value", "low", "high", "ceiling", "slope"]
    assert found.index.tolist() == ["ours", "loss", "removed", "removed", "removed", "loo"]
    good = LDS["good"]
    row = found.loc["ours"]
    assert [row["measure"], *row[["value", "low", "high", "ceiling", "slope"]]] == [
        "LDS", good.value, *good.interval, good.ceiling, good.calibration.slope
    ]  # fmt: skip
    assert found.loc["loss", "value"] == MISLABEL["sharp"].auc
    assert found.loc["loo", ["value", "slope"]].tolist() == [left_out.value, left_out.calibration.slope]
    assert found.loc["removed", "removed"].tolist() == [1, 3, 9]
    np.testing.assert_array_equal(found.loc["removed", ["low", "high"]], REMOVAL["SOURCE"].interval)
    assert found.loc["removed", "value"].tolist() == REMOVAL["SOURCE"].fraction.tolist()


def test_table_leaves_out_columns_that_nothing_fills():
    pytest.importorskip("pandas")
    assert list(table({"loss": MISLABEL["sharp"]}).columns) == ["measure", "value"]
    assert list(table(REMOVAL).columns) == ["measure", "removed", "value", "low", "high"]
    assert table(REMOVAL)["removed"].dtype == int
    with pytest.raises(TypeError, match="'ours' is no result"):
        table({"ours": 0.4})


def test_a_missing_extra_is_named():
    program = """
import sys
sys.modules["matplotlib"] = sys.modules["pandas"] = None
import numpy as np
from source_proj.evaluate import *
masks = half_subsets(8, 6)
result = lds(np.arange(8.0)[None], masks, masks @ np.arange(8.0)[:, None])
for call in (plot_lds, table):
    try:
        call({"one": result})
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.findall(r"source-proj\[(\w+)\]", done.stdout) == ["plot", "pandas"]


@pytest.mark.parametrize("plot", PLOTS)
def test_names_of_methods_are_no_formulas(plot):
    """Between two dollars matplotlib reads one, and raises where it is none."""
    pytest.importorskip("matplotlib")
    named = {f"{name} $x_$": result for name, result in RESULTS[plot].items()}
    figure = PLOTS[plot](named)
    figure.canvas.draw()
    axes = figure.axes[0]
    texts = [*axes.get_legend().get_texts(), *axes.get_yticklabels()]
    shown = [text._preprocess_math(text.get_text())[0] for text in texts]
    assert {name for name in named if any(name in text for text in shown)} == set(named)
