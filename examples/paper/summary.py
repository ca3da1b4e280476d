"""Generate RESULTS.md, and the table in the guide, from what the tasks wrote into ``results/``.

    python examples/paper/summary.py            # write them
    python examples/paper/summary.py --check    # exit 1 if they are not what the results say

Nothing in those tables is typed: every number comes from ``results/<task>.csv``, every fact from ``<task>.json``.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from _grid import ABSENT, between, bold, grid, plain, short, whole
from _sections import PEER, changes, gains, removals, standings, suspicions

__all__ = ["guide_block", "main", "mark_best", "read_results", "results_page"]

HERE = Path(__file__).resolve().parent
RESULTS, GUIDE = HERE / "results", HERE.parent / "guide" / "results.md"
BEGIN, END = "<!-- summary -->", "<!-- end -->"
MOST = 8  # methods in the guide
LARGER, TIMED = "SOURCE, four times the sketch", "SOURCE, time of the retraining"
COLUMNS = [
    "task", "title", "method", "runs", "setting", "lds", "low", "high", "ceiling", "slope", "slope_low", "slope_high",
    "diff", "diff_low", "diff_high",
]  # fmt: skip


def read_results(folder: Path) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Read all tables, in the order of ``all.py``, and the facts of each task.

    Raises:
        ValueError: if there is nothing, a table lacks columns or its facts, or has two rows of one method and kind.
    """
    from all import TASKS

    place = {name.replace(" --", "_"): index for index, name in enumerate(TASKS)}
    paths = sorted(folder.glob("*.csv"), key=lambda path: (place.get(path.stem, len(place)), path.stem))
    if not paths:
        raise ValueError(f"there is no table in {folder}: run a task first, such as concrete.py")
    tables, facts = [], {}
    for path in paths:
        table = pd.read_csv(path)
        missing = [name for name in COLUMNS if name not in table]
        if missing:
            raise ValueError(f"{path} lacks the columns {missing}: run its task again")
        twice = table[table.duplicated(["task", "method", "runs"])]
        if len(twice):
            raise ValueError(f"{path} has several rows for {twice[['method', 'runs']].to_numpy().tolist()}")
        about = path.with_suffix(".json")
        if not about.exists():
            raise ValueError(f"{about} is missing beside {path.name}: run its task again")
        table["best"] = mark_best(table)
        tables.append(table)
        facts[str(table["task"].iloc[0])] = json.loads(about.read_text(encoding="utf-8"))
    return pd.concat(tables, ignore_index=True), facts


def mark_best(table: pd.DataFrame) -> pd.Series:
    """Which rows of one task are the best of their kind (single or multiple), or cannot be told from the best.

    The first row of each kind is SOURCE with its defaults, and ``diff`` is its LDS minus a row's, paired. Where it is
    the best, all rows whose interval of ``diff`` reaches 0 are level with it. Where another is, SOURCE is level if the
    interval of that one's ``diff`` reaches 0, and so is everything between the two.
    """
    marks = pd.Series(False, index=table.index)
    for _, rows in table.groupby("runs"):
        best, source = rows["lds"].idxmax(), rows.index[0]
        if best == source:
            marks[rows.index] = rows["diff_low"] <= 0
        elif rows.loc[best, "diff_high"] >= 0:
            marks[rows.index] = rows["lds"] >= rows.loc[source, "lds"]
        marks[best] = True
    return marks


# Pieces of tables ---------------------------------------------------------------------------------------------


def ranking(table: pd.DataFrame) -> list[str]:
    """Methods, the one first that is on average least behind the best of each task that it was run on."""
    behind = table.groupby("task")["lds"].transform("max") - table["lds"]
    return [str(name) for name in behind.groupby(table["method"]).mean().sort_values(kind="stable").index]


def across(table: pd.DataFrame, cell: Callable[[Any], str], methods: Sequence[str]) -> pd.DataFrame:
    """Methods × tasks of texts, the absent ones marked."""
    texts = table.assign(text=[cell(row) for row in table.itertuples()])
    tasks = list(dict.fromkeys(table["task"]))
    wide = texts.pivot_table(index="method", columns="task", values="text", aggfunc="first")
    return wide.reindex(index=[name for name in methods if name in wide.index], columns=tasks).fillna(ABSENT)


def methods_by_tasks(table: pd.DataFrame, cell: Callable[[Any], str], *, ceiling: bool = False) -> list[str]:
    """A table of methods and tasks; with ``ceiling``, a last row says what retraining's own noise leaves to reach."""
    wide = across(table, cell, ranking(table))
    titles = table.drop_duplicates("task").set_index("task")
    rows = [[str(name), *map(str, cells)] for name, cells in zip(wide.index, wide.to_numpy(), strict=True)]
    if ceiling:
        rows.append(["*ceiling*", *(f"*{short(titles.loc[task, 'ceiling'])}*" for task in wide.columns)])
    return grid(["method", *(str(titles.loc[task, "title"]) for task in wide.columns)], rows)


# The page ------------------------------------------------------------------------------------------------------------


def results_page(table: pd.DataFrame, facts: dict[str, dict[str, Any]], folder: Path, link: str) -> str:
    """The whole of RESULTS.md; ``link`` leads from it to the results' folder."""
    single, multiple = (table[table["runs"] == kind] for kind in ("single", "multiple"))
    slopes = single[single["slope"].notna()]

    def lds(row: Any) -> str:
        return bold(short(row.lds), row.best) + between(row.low, row.high, short)

    lines = [
        "<!-- generated by examples/paper/summary.py: change nothing here -->",
        "# Results",
        "",
        "How well do attribution scores, summed over random halves of the training set, rank what models retrained on "
        "those halves really measure? The linear datamodeling score (LDS): rank correlation, mean over the queries; "
        "below it its 95 % interval by bootstrap over the halves. **Bold**: the best of its column, and what cannot be "
        "told from it by paired intervals. Every method with several settings has the best one, chosen on the other "
        "half of the queries; SOURCE has its defaults. Where AdamW trained, these put a number in place of "
        "Adam's preconditioner; SOURCE in Adam's metric has a line of its own, and rivals are told of SGD unless they "
        "say otherwise. Methods are in the order of "
        f"their mean distance to the best of each task; {ABSENT} where a method was not run.",
        "",
        "## One training run",
        "",
        *methods_by_tasks(single, lds, ceiling=True),
    ]
    if len(multiple):
        lines += ["", "## Several training runs together", "", *methods_by_tasks(multiple, lds, ceiling=True)]
    if len(slopes):
        lines += [
            "",
            "## Calibration",
            "",
            "Slope of the retrained models' measurements on the predicted ones: the size of the scores, not only their "
            "order. Training on a half doubles the weight of every example in it, so a method that is exact to first "
            "order shows 2; scores that are too large show less. Similarities have no size.",
            "",
            *methods_by_tasks(slopes, lambda row: plain(row.slope) + between(row.slope_low, row.slope_high, plain)),
        ]
    lines += [
        *standings(single),
        *gains(single),
        *changes(single),
        *removals(folder / "removal", f"{link}/removal"),
        *suspicions(facts),
    ]
    lines += ["", "## Settings", "", *_settings(table, facts)]
    for task, about in facts.items():
        lines += ["", f"## {about['title']}", "", *(f"* {note}" for note in about.get("notes", ())), ""]
        lines += [*_details(table[table["task"] == task]), "", _links(folder, link, task)]
    return "\n".join(lines) + "\n"


def _links(folder: Path, link: str, task: str) -> str:
    """To the files of a task that are there."""
    names = {
        ".csv": "table",
        ".png": "figure",
        "_panels.png": "panels",
        "_panels.md": "panels",
        "_mislabelled.png": "changed labels",
    }
    there = [f"[{name}]({link}/{task}{end})" for end, name in names.items() if (folder / f"{task}{end}").exists()]
    return "Files: " + ", ".join(there) + "."


def _settings(table: pd.DataFrame, facts: dict[str, dict[str, Any]]) -> list[str]:
    header = ["task", "examples", "queries", "halves × retrainings", "runs", "k", "ceiling, one run / several", "time"]
    rows = []
    for task, about in facts.items():
        ceilings = table[table["task"] == task].groupby("runs")["ceiling"].first()
        both = " / ".join(short(ceilings.get(kind, float("nan"))) for kind in ("single", "multiple"))
        judge = f"{whole(about.get('subsets'))} × {whole(about.get('retrainings'))}"
        numbers = [whole(about.get(name)) for name in ("n", "queries")]
        seconds = about.get("seconds")
        time = ABSENT if seconds is None else f"{seconds / 60:,.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        rows.append([about["title"], *numbers, judge, whole(about.get("runs")), whole(about.get("dim")), both, time])
    machines = list(dict.fromkeys(about["machine"] for about in facts.values() if about.get("machine")))
    lines = [*grid(header, rows), "", "Times are of a whole task, less what earlier runs of it had left in the cache."]
    return [*lines[:-1], f"{lines[-1]} Machine: {'; '.join(machines)}."] if machines else lines


def _details(table: pd.DataFrame) -> list[str]:
    """One task: what each method chose, and how far SOURCE is ahead of it."""
    single, multiple = (table[table["runs"] == kind].set_index("method") for kind in ("single", "multiple"))
    source = single.index[0]
    rows = []
    for method, row in single.iterrows():
        several = multiple.loc[method] if method in multiple.index else None
        rows.append(
            [
                str(method),
                str(row["setting"]) if pd.notna(row["setting"]) else ABSENT,
                bold(short(row["lds"]), row["best"]),
                ABSENT if several is None else bold(short(several["lds"]), several["best"]),
                ABSENT if method == source else short(row["diff"]) + between(row["diff_low"], row["diff_high"], short),
            ]
        )
    return grid(["method", "setting", "one run", "several runs", f"{source} − this, paired"], rows, left=2)


def guide_block(table: pd.DataFrame) -> str:
    """The guide's table: tasks × methods, LDS of one run; then of several.

    Left out are variants of SOURCE but two, what fewer than half of the tasks have (but for the strongest peer), and
    the weakest of more than ``MOST``.
    """
    single, multiple = (table[table["runs"] == kind] for kind in ("single", "multiple"))
    tasks = single.drop_duplicates("task").set_index("task")
    counts = single["method"].value_counts()
    source = single["method"].iloc[0]
    common = [name for name in ranking(single) if 2 * counts[name] >= len(tasks) and not name.startswith(f"{source},")]
    first = [name for name in (source, LARGER, TIMED, PEER) if name in counts]
    methods = [*first, *(name for name in common[:MOST] if name not in first)]
    wide = across(single, lambda row: bold(short(row.lds), row.best), methods)
    rows = []
    for task in wide.columns:
        own = [str(wide.loc[name, task]) for name in methods]
        rows.append([tasks.loc[task, "title"], *own, *_together(multiple[multiple["task"] == task]),
                     f"*{short(tasks.loc[task, 'ceiling'])}*"])  # fmt: skip
    header = ["task", *methods, f"several runs: {source}", "several runs: best other", "*ceiling*"]
    return "\n".join(grid(header, rows))


def _together(rows: pd.DataFrame) -> tuple[str, str]:
    """LDS of several runs together: SOURCE's, and that of the best method that is not one of its variants."""
    if rows.empty:
        return ABSENT, ABSENT
    source, others = rows.iloc[0], rows[~rows["method"].str.contains(rows["method"].iloc[0], regex=False)]
    first = bold(short(source["lds"]), source["best"])
    if others.empty:
        return first, ABSENT
    best = others.loc[others["lds"].idxmax()]
    return first, f"{bold(short(best['lds']), best['best'])}<br><sub>{best['method']}</sub>"


def with_block(page: str, block: str) -> str:
    """The guide's page with the block between its marks.

    Raises:
        ValueError: if the marks are not there.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the guide's page has no lines {BEGIN!r} and {END!r}: put them where the table belongs")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="what the tasks wrote")
    parser.add_argument("--output", type=Path, help="default: RESULTS.md beside the results' folder")
    parser.add_argument(
        "--guide", type=Path, help="default: the guide's results.md, for this repository's results only"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is out of date")
    options = parser.parse_args(arguments)
    results = options.results.resolve()
    output = (options.output or results.parent / "RESULTS.md").resolve()
    guide = options.guide or (GUIDE if results == RESULTS else None)
    try:
        table, facts = read_results(results)
        wanted = {output: results_page(table, facts, results, Path(os.path.relpath(results, output.parent)).as_posix())}
        if guide is not None:
            wanted[guide] = with_block(guide.read_text(encoding="utf-8"), guide_block(table))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if options.check:
            print(f"{path} is not what {results} says: run python examples/paper/summary.py", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
