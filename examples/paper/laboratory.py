r"""The accuracy laboratory: every choice inside SOURCE, one at a time, judged by the same retrainings.

    python examples/paper/laboratory.py                                 # all studies on four tasks
    python examples/paper/laboratory.py --tasks concrete --studies c,f

One task is converged (Fashion-MNIST), one is not (Fashion-MNIST-N), one has two stages (RotatedMNIST), one is a small
regression (Concrete). The reference, the library's default, is one segment a stage, empirical Fisher (Gauss-Newton
for regression, but not in (h)), damping tr(Ĥ)/k in c and none in S, the query's gradient averaged over the last stage's
checkpoints. A study changes one thing; each line says by how much the LDS then differs from the reference's, with the
paired 95 % bootstrap interval, mean over training runs.

Studies: (a) sketch dimension, up to no sketch where that fits; (b) which Hessian; (c) damping; (d) segments and
checkpoints; (e) averaging query gradients over the last checkpoints; (f) time scale and weight decay; (g) runs against
dimension at equal bytes; (h) two half-sketches against a whole one; (i) the time scale at other sampling ratios (only
where asked for: it retrains); (j) what becomes of Adam's metric, on tasks that AdamW trained (where asked for); (k) the
sketch's kind at equal dimension (where asked for), each line against the sparse map's; (l) numbers against bits, at
equal bytes a row (where asked for); (m) damping chosen from the bank alone (where asked for); (n) segments with and
without a sketch (where asked for), each line against one segment; (o) weight noise and dropout masks in the place of
runs, at equal bytes (where asked for); (p) rows captured while training, against checkpoints' (where asked for);
(q) which parameters to attribute through, each line against all of them (where asked for); (r) what gradients of
parameters are multiplied by, on which checkpoints agree more or less, each line against equal weights, which all other
studies have (where asked for); (s) the rows of many checkpoints kept as their mean (where asked for):

    python examples/paper/laboratory.py --tasks fashion_mnist_adamw,rte,wikitext2 --studies f,j
    python examples/paper/laboratory.py --tasks pima_logistic,mnist,concrete,fashion_mnist,rotated_mnist --studies k
    python examples/paper/laboratory.py --tasks concrete,fashion_mnist,shakespeare --studies l
    python examples/paper/laboratory.py --tasks concrete,fashion_mnist,fashion_mnist_noise,shakespeare --studies p
    python examples/paper/laboratory.py --tasks wikitext2,wikitext2_letters,shakespeare,shakespeare_words \
        --studies q,r --dim 4096
    python examples/paper/laboratory.py --tasks mnist,fashion_mnist,fashion_mnist_noise,rte --studies r --dim 4096
    python examples/paper/laboratory.py --tasks concrete,mnist,fashion_mnist --studies s
"""

import argparse
import dataclasses
import importlib
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from _bench import Bench
from _pipeline import ground_truth, home
from _problem import parser, sized
from _studies import FISHER, REFERENCE, STUDIES
from _study import drift

from source_proj.evaluate import LDS, GroundTruth, compare, lds, mean_lds

TASKS = ["fashion_mnist", "fashion_mnist_noise", "rotated_mnist", "concrete"]


def study(bench: Bench, letter: str) -> pd.DataFrame:
    """All lines of one study on one task."""
    default = None
    rows = []
    for variant in STUDIES[letter](bench):
        name, scores = variant[0], variant[1]
        truth = variant[2] if len(variant) > 2 else bench.truth
        if len(variant) > 3:
            compared = variant[3]
        else:
            compared = default = default or bench.scores(FISHER if letter == "h" else REFERENCE)
        reference, judged = _lds(compared, truth), _lds(scores, truth)
        difference = compare(judged, reference)
        rows.append(
            {"task": bench.problem.name, "study": letter, "variant": name, "lds": judged.value,
             "low": judged.interval[0], "high": judged.interval[1], "diff": difference.value,
             "diff_low": difference.interval[0], "diff_high": difference.interval[1]}
        )  # fmt: skip
        print(f"{bench.problem.name:20s} {letter}  {name:55s} {judged.value:.3f}  {difference.value:+.3f} "
              f"[{difference.interval[0]:+.3f}, {difference.interval[1]:+.3f}]", flush=True)  # fmt: skip
    return pd.DataFrame(rows)


def _lds(scores: list[np.ndarray], truth: GroundTruth) -> LDS:
    return mean_lds([lds(one, truth) for one in scores])


def main() -> None:
    """Run the studies asked for, task by task."""
    options = parse()
    for name in options.tasks.split(","):
        problem = importlib.import_module(name).problem(options)
        problem = dataclasses.replace(problem, sizes=replace(problem.sizes, sketches=1))
        bench = Bench(
            problem, ground_truth(problem, options), home(problem, options), options.runs,
            options.dim or sized(options, 8192, 2048, 256),
        )  # fmt: skip
        for letter in options.studies.split(","):
            started = time.perf_counter()
            table = study(bench, letter)
            print(f"({letter}) {time.perf_counter() - started:.0f} s", flush=True)
            if not options.quick:
                _merge(options.results / "laboratory" / "studies.csv", table)
        moved = pd.DataFrame([{"task": name, "study": "drift", **row} for row in drift(bench.bank(0))])
        print(moved.round(3).to_string(index=False), flush=True)
        if not options.quick:
            _merge(options.results / "laboratory" / "drift.csv", moved)


def parse() -> argparse.Namespace:
    """Options."""
    found = parser(__doc__ or "")
    found.add_argument("--tasks", default=",".join(TASKS), help="names of task files, separated by commas")
    found.add_argument("--studies", default="a,b,c,d,e,f,g,h", help="letters, separated by commas")
    found.add_argument("--runs", type=int, default=2, help="training runs")
    found.add_argument("--dim", type=int, help="sketch dimension k of the reference (default 2,048)")
    return found.parse_args()


def _merge(path: Path, table: pd.DataFrame) -> None:
    """Replace the lines of these tasks and studies, keep the others."""
    if path.exists():
        old = pd.read_csv(path)
        done = set(zip(table["task"], table["study"], strict=True))
        old = old[[pair not in done for pair in zip(old["task"], old["study"], strict=True)]]
        table = pd.concat([old, table])
    path.parent.mkdir(parents=True, exist_ok=True)
    table.sort_values(["task", "study"], kind="stable").to_csv(path, index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
