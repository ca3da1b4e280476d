"""Sections of RESULTS.md on what else the tasks say: what helped, removals, changed labels."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from _grid import ABSENT, between, bold, grid, plain, short

__all__ = ["PEER", "STEPS", "changes", "gains", "removals", "standings", "suspicions"]

PEER = "EK-FAC influence functions, averaged"
STANDARD = ["Influence functions, averaged", PEER]  # at their best damping: what SOURCE's defaults have to reach

STEPS = {  # method: what it is called among the steps
    "Influence functions": "influence functions",
    "SOURCE, query at the end": "+ averages, damping, unrolling",
    "SOURCE": "+ mean query gradient (SOURCE)",
    "SOURCE, time of the retraining": "+ time of the retraining",
    "Influence functions, averaged": "SOURCE without unrolling",
}
CHANGES = {  # method: what its defaults are called among the laboratory's changes; the first that a task has counts
    "at first": ["SOURCE, empirical Fisher, query at the end", "SOURCE, query at the end"],
    "+ mean query gradient": ["SOURCE, empirical Fisher", "SOURCE"],
    "+ Gauss-Newton for regression": ["SOURCE"],
}


def standings(single: pd.DataFrame) -> list[str]:
    """A section on whether SOURCE is ahead of the strongest rivals, by paired intervals."""
    rows = []
    for _, own in single.groupby("task", sort=False):
        source, by_method = own["method"].iloc[0], own.set_index("method")
        rivals = by_method[~by_method.index.str.contains(source, regex=False)]
        if rivals.empty:
            continue
        best = rivals.loc[rivals["lds"].idxmax()]
        cells = [
            _standing(rivals.loc[name], difference) if name in rivals.index else ABSENT
            for difference in ("diff", "timed")
            for name in (*STANDARD, best.name)
        ]
        rows.append([str(own["title"].iloc[0]), *cells, str(best.name)])
    text = (
        "Whether SOURCE, one run, is ahead of the same run's influence functions that average over its checkpoints as "
        "SOURCE does: in the bank (IF), and with all of the network's gradients by kronfluence's EK-FAC; then of the "
        "best of all rivals, which the last column names. Each of them has its best damping for these halves; SOURCE "
        "has its defaults, which are for leaving out a few examples, or knows that a retraining on a half takes half "
        "of the steps (`time_scale=0.5`). The number is SOURCE's LDS minus theirs; *level* means that its paired "
        f"interval reaches 0; {ABSENT} where a method was not run, or the table is of before this was asked."
    )
    against = ["IF", "EK-FAC", "best rival"]
    header = [
        "task",
        *(f"defaults − {name}" for name in against),
        *(f"timed − {name}" for name in against),
        "best rival",
    ]
    return ["", "## Who is ahead", "", text, "", *grid(header, rows)] if rows else []


def _standing(row: Any, difference: str) -> str:
    """Ahead, level or behind, from SOURCE's side."""
    value, low, high = (row.get(f"{difference}{end}", float("nan")) for end in ("", "_low", "_high"))
    if pd.isna(value):
        return ABSENT
    verdict = "ahead" if low > 0 else "behind" if high < 0 else "level"
    return f"{bold(verdict, verdict == 'ahead')} {short(value)}{between(low, high, short)}"


def gains(single: pd.DataFrame) -> list[str]:
    """A section that takes SOURCE's lead apart, of the tasks that have all the steps."""
    wide = single.pivot_table(index="task", columns="method", values="lds", sort=False)
    if not set(STEPS) <= set(wide.columns):
        return []
    titles = single.drop_duplicates("task").set_index("task")["title"]
    rows = [
        [titles[task], *map(short, row)] for task, row in zip(wide.index, wide[list(STEPS)].to_numpy(), strict=True)
    ]
    return [
        "",
        "## Where the gain comes from",
        "",
        "From influence functions at the last checkpoint (at their best damping), step by step: training gradients and "
        "Hessian averaged over the checkpoints, damped by the sketch's own noise and unrolled; then the query's "
        "gradient averaged too, which is SOURCE with its defaults; then the time that the retraining takes. The last "
        "column takes unrolling away again: influence functions with all averages, at their best damping. Where AdamW "
        "trained, the first and the last column do not know of it.",
        "",
        *grid(["task", *STEPS.values()], rows),
    ]


def changes(single: pd.DataFrame) -> list[str]:
    """A section on what the laboratory's changes of the defaults brought, of the tasks that have all of them."""
    rows = []
    for _, own in single.groupby("task", sort=False):
        known = own.set_index("method")["lds"]
        found = [next((known[name] for name in names if name in known), None) for names in CHANGES.values()]
        values = [value for value in found if value is not None]
        if len(values) == len(CHANGES):
            rows.append([str(own["title"].iloc[0]), *map(short, values)])
    text = (
        "LDS of one run with the defaults before and after what the laboratory (LABORATORY.md) changed, in its order."
    )
    return ["", "## Before and after", "", text, "", *grid(["task", *CHANGES], rows)] if rows else []


def removals(folder: Path, link: str) -> list[str]:
    """A section on subset removal, a table for each task that has it."""
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        return []
    lines = [
        "",
        "## Subset removal",
        "",
        "Fraction of correctly predicted queries whose prediction flips when a method's most helpful examples are left "
        "out and the network is trained again; scores are means over the runs. **Bold**: the most at that number, and "
        "what cannot be told from SOURCE by paired intervals over queries where SOURCE is the most. The baseline "
        "removes random examples of the query's class, whatever they say: it ends by leaving a class without examples, "
        "and so does RepSim.",
    ]
    for path in paths:
        table = pd.read_csv(path)
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        sizes = list(dict.fromkeys(table["removed"]))
        rows = [
            [str(name), *(_flipped(row, table) for row in own.itertuples())]
            for name, own in table.groupby("method", sort=False)
        ]
        title = f"### {about['title']}: {about['n']:,} examples, {about['queries']} queries, {about['runs']} runs"
        lines += ["", title, "", *grid(["method", *(f"{size:,} removed" for size in sizes)], rows), ""]
        lines += [f"Files: [table]({link}/{path.name}), [figure]({link}/{path.stem}.png)."]
    return lines


def _flipped(row: Any, table: pd.DataFrame) -> str:
    same = table[table["removed"] == row.removed]
    most, first = same["flipped"].max(), same["flipped"].iloc[0]
    level = row.flipped == most or (first == most and row.diff_low <= 0)
    return bold(plain(row.flipped), level) + between(row.low, row.high, plain)


def suspicions(facts: dict[str, dict[str, Any]]) -> list[str]:
    """A section on the tasks whose labels were changed."""
    found = {about["title"]: about["mislabelled"] for about in facts.values() if "mislabelled" in about}
    if not found:
        return []
    names = list(dict.fromkeys(name for one in found.values() for name in one))
    rows = [[title, *(short(one[name]) if name in one else ABSENT for name in names)] for title, one in found.items()]
    text = (
        "Area under the ROC curve with which self-influence, or the size of the gradient alone, tells examples whose "
        "label was changed from the others; no retraining is asked."
    )
    return ["", "## Changed labels", "", text, "", *grid(["task", *names], rows)]
