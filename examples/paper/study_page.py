"""Write the tables of the accuracy laboratory into STUDIES.md, between its two marks, from results/laboratory.

The figure of study (l) is drawn beside them.

    python examples/paper/study_page.py            # write them
    python examples/paper/study_page.py --check    # exit 1 if they are not what the results say

What was found in them is told by hand, in LABORATORY.md; the numbers of the tables never are.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from _bytes import draw_bytes
from _grid import ABSENT, bold, grid, short

__all__ = ["main", "tables"]

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "laboratory", HERE / "STUDIES.md"
BEGIN, END = "<!-- studies -->", "<!-- end -->"
TITLES = {
    "a": "Sketch dimension",
    "b": "Curvature",
    "c": "Damping",
    "d": "Segments and checkpoints",
    "e": "Where the query's gradient is taken",
    "f": "Time scale and weight decay",
    "g": "Runs against dimension, at equal bytes",
    "h": "Two half-sketches against a whole one",
    "i": "Time scale at other sampling ratios",
    "j": "Adam's metric, segments and time",
    "k": "The sketch's kind at equal dimension",
    "l": "Numbers against bits, at equal bytes",
    "m": "Damping chosen without retraining",
    "n": "Segments without a sketch",
    "o": "Members without training, at equal bytes",
    "p": "Rows captured while training",
    "q": "Which parameters",
    "r": "Weights of parameters",
    "s": "Many checkpoints in one row",
}
TASKS = {
    "fashion_mnist": "Fashion-MNIST",
    "fashion_mnist_noise": "Fashion-MNIST-N",
    "rotated_mnist": "RotatedMNIST",
    "cifar10": "CIFAR-10",
    "concrete": "Concrete",
    "mnist": "MNIST",
    "concrete_noise": "Concrete-N",
    "pima_logistic": "Pima, logistic",
    "fashion_mnist_adamw": "Fashion-MNIST, AdamW",
    "fashion_mnist_adamw_noise": "Fashion-MNIST-N, AdamW",
    "rte": "RTE",
    "wikitext2": "WikiText-2",
    "wikitext2_letters": "WikiText-2, by characters",
    "shakespeare": "Shakespeare, by characters",
    "shakespeare_words": "Shakespeare, by words",
}


def tables(studies: pd.DataFrame, moved: pd.DataFrame | None) -> str:
    """Markdown: a table for each study, a column for each task, and how far the runs move."""
    parts = []
    for letter, title in TITLES.items():
        own = studies[studies["study"] == letter]
        if len(own):
            parts += [f"### ({letter}) {title}", "", *_table(own), ""]
    if moved is not None:
        parts += ["### How far the runs move between the halves of a stage", ""]
        rows = [
            [TASKS.get(row.task, row.task), row.stage, f"{row.gradients:.2f}", f"{row.Hessians:.2f}",
             _signed(row.traces, 2)]
            for row in moved.itertuples()
        ]  # fmt: skip
        parts += grid(["task", "stage", "gradients", "Hessians", "log-ratio of traces"], rows, left=2)
    return "\n".join(parts).rstrip()


def _table(own: pd.DataFrame) -> list[str]:
    tasks = [task for task in TASKS if task in set(own["task"])]
    rows = []
    for variant in dict.fromkeys(own["variant"]):
        by_task = own[own["variant"] == variant].set_index("task")
        rows.append([variant, *(_cell(by_task.loc[task]) if task in by_task.index else ABSENT for task in tasks)])
    return grid(["variant", *(TASKS[task] for task in tasks)], rows)


def _cell(row: pd.Series) -> str:
    """LDS, and its difference to the reference with half the width of its interval; bold where it is significant.

    "(=)" marks the reference itself, and what is the same to four digits.
    """
    if row["diff"] == 0 and row["diff_low"] == 0:
        return f"{short(row['lds'])} (=)"
    half = (row["diff_high"] - row["diff_low"]) / 2
    text = f"{short(row['lds'])} ({_signed(row['diff'], 3)} ± {half:.3f})"
    return bold(text, row["diff_low"] > 0 or row["diff_high"] < 0)


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    options = parser.parse_args(arguments)
    drift = RESULTS / "drift.csv"
    studies = pd.read_csv(RESULTS / "studies.csv")
    found = tables(studies, pd.read_csv(drift) if drift.exists() else None)
    text = PAGE.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has no lines {BEGIN!r} and {END!r}: put them where the tables belong")
    page = f"{head}{BEGIN}\n\n{found}\n\n{END}{tail}"
    if options.check:
        if page != text:
            print(f"{PAGE} is not what {RESULTS} says: run python examples/paper/study_page.py", file=sys.stderr)
        return int(page != text)
    PAGE.write_text(page, encoding="utf-8")
    draw_bytes(studies, TASKS, RESULTS / "bytes.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
