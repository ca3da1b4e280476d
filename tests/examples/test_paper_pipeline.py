"""The paper's pipeline, end to end in miniature on the digits that scikit-learn ships."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from source_proj.evaluate import Candidate

PAPER = Path(__file__).parents[2] / "examples" / "paper"
QUICK = ["--quick", "--cache", "cache", "--results", "results"]


RUNNER = """
import runpy, sys
for command in sys.argv[1:]:
    sys.argv = command.split("|")
    sys.path.insert(0, sys.argv[0].rpartition("/")[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
    print("== end", flush=True)
"""


def run(*commands, cwd):
    """What each of some scripts prints that run in one process, which imports once."""
    search = os.pathsep.join(filter(None, [str(PAPER.parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *("|".join(map(str, [*command, *QUICK])) for command in commands)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split("== end\n")[:-1]


@pytest.mark.slow
def test_a_task_and_a_study_run_end_to_end(tmp_path):
    for extra in ("sklearn", "pandas", "joblib", "matplotlib"):
        pytest.importorskip(extra)
    laboratory = [PAPER / "laboratory.py", "--tasks", "rotated_digits", "--studies", "e", "--runs", "1"]
    table, study = run([PAPER / "rotated_digits.py"], laboratory, cwd=tmp_path)
    scored = set(re.findall(r"^\d+ +(\S.*?) +(?:single|multiple) ", table, re.MULTILINE))
    assert scored >= {
        "SOURCE", "SOURCE, query at the end", "SOURCE, time of the retraining", "SOURCE, averaged parameters", "TRAK",
        "Influence functions", "Influence functions, averaged", "TracIn", "Hydra (fast)", "GradDot", "GradCos",
        "RepSim", "Empirical influence", "EK-FAC SOURCE", "EK-FAC SOURCE, mean query gradient",
    }  # fmt: skip
    # What one run retrained, the next finds; and a miniature is no result.
    assert len(re.findall(r"^rotated_digits +e ", study, re.MULTILINE)) == 5
    assert re.search(r"mean over all of the last stage +\S+ +\+0\.000 \[\+0\.000, \+0\.000\]", study)
    assert not (tmp_path / "results").exists()


def comparison(lds, *methods):
    """What compare_methods found: SOURCE, and methods whose LDS is one tenth less each time."""
    import pandas as pd

    rows = [
        {"method": name, "runs": runs, "lds": lds - 0.1 * i, "ceiling": 0.9 if runs == "multiple" else float("nan")}
        for i, name in enumerate(["SOURCE", *methods])
        for runs in ("single", "multiple")
    ]
    ahead = pd.DataFrame(rows).assign(diff=0.0, diff_low=-0.1, diff_high=0.1).drop(columns=["lds", "ceiling"])
    return SimpleNamespace(table=lambda: pd.DataFrame(rows), behind=lambda _: ahead)


def test_rows_of_some_methods_go_into_the_table_that_is_there(tmp_path, monkeypatch):
    """In place of the method's own; where SOURCE says other things, the table is of other retrainings."""
    pd = pytest.importorskip("pandas")
    monkeypatch.syspath_prepend(str(PAPER))
    from _pipeline import chosen, merge

    problem, path = SimpleNamespace(name="mnist", title="MNIST"), tmp_path / "mnist.csv"
    own = comparison(0.5, "TRAK", "peer").table()
    own.insert(0, "title", "MNIST")
    own.insert(0, "task", "mnist")
    own.to_csv(path, index=False, float_format="%.4f")
    merge(problem, comparison(0.50003, "peer", "peer, averaged"), path)
    table = pd.read_csv(path)
    assert list(table["method"][::2]) == ["SOURCE", "TRAK", "peer", "peer, averaged"]
    single = table[table["runs"] == "single"].set_index("method")["lds"]
    assert single.to_dict() == {"SOURCE": 0.5, "TRAK": 0.4, "peer": 0.4, "peer, averaged": 0.3}
    assert set(table["title"]) == {"MNIST"}
    before = path.read_bytes()
    with pytest.raises(ValueError, match="other retrainings or defaults"):
        merge(problem, comparison(0.51, "peer"), path)
    assert path.read_bytes() == before
    every = [Candidate(name, "", list) for name in ("SOURCE", "SOURCE, more segments", "TRAK", "TracIn")]
    assert chosen(every, "Tra") == [every[0], every[3]]
    with pytest.raises(ValueError, match=r"no method begins with 'IF'; there are \['SOURCE',"):
        chosen(every, "IF")
