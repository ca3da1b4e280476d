import json
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pd = pytest.importorskip("pandas")


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    for folder in (EXAMPLES, EXAMPLES / "paper"):
        monkeypatch.syspath_prepend(str(folder))


def row(method, lds, diff, runs="single", **more):
    own = {
        "method": method, "runs": runs, "setting": "defaults", "lds": lds, "low": lds - 0.02, "high": lds + 0.02,
        "ceiling": 0.9, "slope": 1.5, "slope_low": 1.25, "slope_high": 1.75,
        "diff": diff[0], "diff_low": diff[1], "diff_high": diff[2],
    }  # fmt: skip
    return {**own, **more}


def write_task(folder, name, rows, **facts):
    folder.mkdir(exist_ok=True)
    title = name.capitalize()
    table = pd.DataFrame(rows)
    table.insert(0, "title", title)
    table.insert(0, "task", name)
    table.to_csv(folder / f"{name}.csv", index=False)
    about = {"title": title, "notes": [f"note of {name}"], "n": 1500, "queries": 150, "subsets": 100, "retrainings": 2}
    about |= {"runs": 3, "dim": 2048, "seconds": 600, "machine": "a computer"}
    (folder / f"{name}.json").write_text(json.dumps({**about, **facts}))


def two_tasks(folder):
    """The first: SOURCE best, one rival level with it. The second: a rival is best, clearly."""
    write_task(
        folder,
        "concrete",
        [
            row("SOURCE", 0.4, (0, 0, 0)),
            row("SOURCE", 0.5, (0, 0, 0), "multiple", ceiling=0.95),
            row("TRAK", 0.39, (0.01, -0.01, 0.03)),
            row("TRAK", 0.45, (0.05, 0.03, 0.07), "multiple", ceiling=0.95),
            row("TracIn", -0.02, (0.42, 0.4, 0.44), slope=np.nan, setting="a | b"),
        ],
    )
    write_task(folder, "mnist", [row("SOURCE", 0.3, (0, 0, 0)), row("TRAK", 0.35, (-0.05, -0.07, -0.03))])


def lines_of(text, heading):
    """Cells of the table below a heading, by the first cell."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in part.splitlines() if line.startswith("|")]
    return {cells[0].lstrip("| "): [cell.rstrip(" |") for cell in cells[1:]] for cells in rows}


def run(folder, *more):
    from summary import main

    return main(["--results", str(folder), *more])


def test_tables_say_what_the_results_say(tmp_path):
    two_tasks(tmp_path / "results")
    assert run(tmp_path / "results") == 0
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    single = lines_of(text, "One training run")
    assert single["method"] == ["Concrete", "Mnist"]
    assert single["SOURCE"] == ["**.400**<br><sub>.380 to .420</sub>", ".300<br><sub>.280 to .320</sub>"]
    assert single["TRAK"] == ["**.390**<br><sub>.370 to .410</sub>", "**.350**<br><sub>.330 to .370</sub>"]
    assert single["TracIn"] == ["−.020<br><sub>−.040 to .000</sub>", "–"]
    assert single["*ceiling*"] == ["*.900*", "*.900*"]
    assert list(single) == ["method", "---", "TRAK", "SOURCE", "TracIn", "*ceiling*"]  # by distance to the best
    multiple = lines_of(text, "Several training runs together")
    assert multiple["method"] == ["Concrete"]
    assert [multiple[name][0][:9] for name in ("SOURCE", "TRAK")] == ["**.500**<", ".450<br><"]
    slopes = lines_of(text, "Calibration")
    assert "TracIn" not in slopes
    assert slopes["TRAK"] == ["1.50<br><sub>1.25 to 1.75</sub>"] * 2
    assert lines_of(text, "Settings")["Concrete"] == [
        "1,500", "150", "100 × 2", "3", "2,048", ".900 / .950", "10 min"
    ]  # fmt: skip
    assert lines_of(text, "Settings")["Mnist"][5] == ".900 / –"
    details = lines_of(text, "Concrete")
    assert details["TRAK"] == ["defaults", "**.390**", ".450", ".010<br><sub>−.010 to .030</sub>"]
    assert details["SOURCE"][-1] == "–"
    assert "a \\| b" in text
    assert "* note of mnist" in text
    assert "a computer" in text
    assert "[table](results/mnist.csv)." in text  # and no link to files that are not there


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0.4, 0, 0), (0.39, -0.01, 0.03), (0.2, 0.1, 0.3)], [True, True, False]),  # SOURCE best, one level with it
        ([(0.4, 0, 0), (0.39, 0.005, 0.015)], [True, False]),  # SOURCE best, alone
        ([(0.4, 0, 0), (0.42, -0.05, 0.01), (0.41, -0.03, 0.01), (0.39, 0, 0.02)], [True, True, True, False]),
        ([(0.4, 0, 0), (0.5, -0.2, -0.01), (0.45, -0.1, 0.01)], [False, True, False]),  # a rival best, alone
    ],
)
def test_what_is_level_with_the_best_is_marked(rows, expected):
    from summary import mark_best

    table = pd.DataFrame(rows, columns=["lds", "diff_low", "diff_high"]).assign(runs="single")
    assert mark_best(table).tolist() == expected
    both = pd.concat([table, table.assign(runs="multiple", lds=-table["lds"], diff_low=1.0, diff_high=2.0)])
    both = both.reset_index(drop=True)
    found = mark_best(both).tolist()
    assert found[: len(rows)] == expected  # one kind does not judge the other
    assert found[len(rows) :][int(np.argmin(table["lds"]))]


PAGE = "# Title\n\n<!-- quickstart -->\ncode\n<!-- end -->\n\n<!-- summary -->\nold\n<!-- end -->\n\nrest\n"


def test_the_page_gets_its_block_and_keeps_the_rest(tmp_path):
    two_tasks(tmp_path / "results")
    page = tmp_path / "results.md"
    page.write_text(PAGE)
    assert run(tmp_path / "results", "--guide", str(page)) == 0
    text = page.read_text(encoding="utf-8")
    head, rest = PAGE.split("old\n")
    assert text.startswith(head)
    assert text.endswith(rest)
    block = text[len(head) : -len(rest)].splitlines()
    assert block[0] == "| task | SOURCE | TRAK | TracIn | several runs: SOURCE | several runs: best other | *ceiling* |"
    assert block[2] == "| Concrete | **.400** | **.390** | −.020 | **.500** | .450<br><sub>TRAK</sub> | *.900* |"
    assert block[3] == "| Mnist | .300 | **.350** | – | – | – | *.900* |"


def test_variants_and_rare_methods_are_not_in_the_page(tmp_path):
    from summary import guide_block, read_results

    for name in ("concrete", "mnist", "rte"):
        extra = [row("rare", 0.1, (0.3, 0.2, 0.4))] if name == "rte" else []
        rows = [row("SOURCE", 0.4, (0, 0, 0)), row("SOURCE, three segments", 0.3, (0.1, 0, 0.2))]
        write_task(tmp_path / "r", name, [*rows, row("TRAK", 0.2, (0.2, 0.1, 0.3)), *extra])
    table, _ = read_results(tmp_path / "r")
    assert guide_block(table).splitlines()[0].startswith("| task | SOURCE | TRAK | several runs")


def test_the_weakest_of_many_methods_are_not_in_the_page(tmp_path):
    from summary import MOST, guide_block, read_results

    rivals = [row(f"rival {i}", 0.6 - 0.05 * i, (0, -0.1, 0.1)) for i in range(MOST + 2)]
    write_task(tmp_path / "r", "mnist", [row("SOURCE", 0.1, (0, 0, 0)), *rivals])  # SOURCE stays, however weak
    header = guide_block(read_results(tmp_path / "r")[0]).splitlines()[0]
    shown = [cell.strip() for cell in header.split("|")[2:-4]]
    assert shown == ["SOURCE"] + [f"rival {i}" for i in range(MOST)]


def test_the_steps_to_the_gain_are_shown_where_all_are_there(tmp_path):
    from _sections import STEPS
    from summary import read_results, results_page

    folder = tmp_path / "r"
    write_task(folder, "concrete", [row(name, 0.1 * (i + 1), (0, 0, 0)) for i, name in enumerate(STEPS)])
    write_task(folder, "mnist", [row("SOURCE", 0.4, (0, 0, 0))])
    lines = results_page(*read_results(folder), folder, "r").splitlines()
    assert _section(lines, "Where the gain comes from") == [
        "| Concrete | .100 | .200 | .300 | .400 | .500 |",
        "| Mnist | – | – | .400 | – | – |",
    ]
    write_task(tmp_path / "other", "mnist", [row("SOURCE", 0.4, (0, 0, 0))])
    alone = results_page(*read_results(tmp_path / "other"), tmp_path / "other", "r")
    assert "Where the gain comes from" not in alone


def test_who_is_ahead_is_told_by_paired_intervals(tmp_path):
    from _sections import PEER
    from summary import guide_block, read_results, results_page

    ahead, level, behind = (0.05, 0.01, 0.09), (-0.01, -0.03, 0.01), (-0.1, -0.2, -0.01)
    averaged = "Influence functions, averaged"
    source, variant = row("SOURCE", 0.4, (0, 0, 0)), row("SOURCE, three segments", 0.9, (-0.5, -0.6, -0.4))
    folder = tmp_path / "r"
    write_task(folder, "concrete", [source, row(averaged, 0.35, ahead), row(PEER, 0.41, level)])
    timed = {"timed": 0.02, "timed_low": 0.01, "timed_high": 0.03}
    write_task(folder, "mnist", [source, variant, row("TRAK", 0.5, behind, **timed)])
    write_task(folder, "rte", [source, variant])  # none to compare with
    table, facts = read_results(folder)
    lines = results_page(table, facts, folder, "r").splitlines()
    assert _section(lines, "Who is ahead") == [
        "| Concrete | **ahead** .050<br><sub>.010 to .090</sub> | level −.010<br><sub>−.030 to .010</sub> "
        f"| level −.010<br><sub>−.030 to .010</sub> | – | – | – | {PEER} |",
        "| Mnist | – | – | behind −.100<br><sub>−.200 to −.010</sub> | – | – "
        "| **ahead** .020<br><sub>.010 to .030</sub> | TRAK |",
    ]
    guide = guide_block(table).splitlines()
    assert guide[0].startswith(f"| task | SOURCE | {PEER} | several runs")  # though one task in three has it
    assert guide[2].startswith("| Concrete | **.400** | **.410** |")
    assert guide[3].startswith("| Mnist | .400 | – |")


def test_changed_defaults_are_shown_of_tasks_that_have_them_all(tmp_path):
    from summary import read_results, results_page

    before = ["SOURCE, empirical Fisher, query at the end", "SOURCE, empirical Fisher"]
    write_task(
        tmp_path / "r",
        "concrete",
        [row(n, x, (0, 0, 0)) for n, x in zip(["SOURCE", *before], [0.5, 0.1, 0.3], strict=True)],
    )
    rows = [row("SOURCE", 0.4, (0, 0, 0)), row("SOURCE, query at the end", 0.2, (0.2, 0.1, 0.3))]
    write_task(tmp_path / "r", "mnist", rows)  # regression's change is none there
    write_task(tmp_path / "r", "rte", [row("SOURCE", 0.4, (0, 0, 0))])
    lines = results_page(*read_results(tmp_path / "r"), tmp_path / "r", "r").splitlines()
    assert _section(lines, "Before and after") == [
        "| Concrete | .100 | .300 | .500 |",
        "| Mnist | .200 | .400 | .400 |",
    ]


def test_removals_and_changed_labels_are_shown_where_they_were_tried(tmp_path):
    from _sections import removals, suspicions

    assert removals(tmp_path / "removal", "r") == []
    assert suspicions({"mnist": {"title": "MNIST"}}) == []
    (tmp_path / "removal").mkdir()
    (tmp_path / "removal" / "mnist.json").write_text('{"title": "MNIST", "n": 2000, "queries": 40, "runs": 3}')
    (tmp_path / "removal" / "mnist.csv").write_text(
        "task,method,removed,queries,flipped,low,high,diff,diff_low,diff_high\n"
        "mnist,SOURCE,10,40,0.5,0.4,0.6,0,0,0\nmnist,SOURCE,20,40,0.6,0.5,0.7,0,0,0\n"
        "mnist,TRAK,10,40,0.45,0.3,0.6,0.05,-0.1,0.1\nmnist,TRAK,20,40,0.7,0.6,0.8,-0.1,-0.2,-0.05\n"
    )
    lines = removals(tmp_path / "removal", "r")
    assert "### MNIST: 2,000 examples, 40 queries, 3 runs" in lines
    table = [line for line in lines if line.startswith("|")][2:]
    level = "**0.45**<br><sub>0.30 to 0.60</sub>"  # its interval against SOURCE, the most, reaches 0
    assert table == [
        "| SOURCE | **0.50**<br><sub>0.40 to 0.60</sub> | 0.60<br><sub>0.50 to 0.70</sub> |",
        f"| TRAK | {level} | **0.70**<br><sub>0.60 to 0.80</sub> |",
    ]
    found = suspicions({"a": {"title": "A", "mislabelled": {"SOURCE": 0.9}}, "b": {"title": "B"}})
    assert [line for line in found if line.startswith("|")][2:] == ["| A | .900 |"]


def _section(lines, title):
    """Rows of a section's table."""
    start = lines.index(f"## {title}")
    stop = next(i for i, line in enumerate(lines) if i > start and line.startswith("## "))
    return [line for line in lines[start:stop] if line.startswith("|")][2:]


def test_check_tells_whether_anything_is_out_of_date(tmp_path, capsys):
    two_tasks(tmp_path / "results")
    page = tmp_path / "results.md"
    page.write_text(PAGE)
    options = (tmp_path / "results", "--guide", str(page))
    assert run(*options, "--check") == 1
    assert not (tmp_path / "RESULTS.md").exists()
    assert page.read_text() == PAGE
    assert run(*options) == 0
    assert run(*options, "--check") == 0
    capsys.readouterr()
    page.write_text(page.read_text(encoding="utf-8").replace(".400", ".500"), encoding="utf-8")
    assert run(*options, "--check") == 1
    assert "results.md is not what" in capsys.readouterr().err


def test_tasks_come_in_the_order_they_are_run(tmp_path):
    from summary import read_results

    for name in ("another", "wikitext2", "pima_logistic_optimal", "concrete"):
        write_task(tmp_path / "r", name, [row("SOURCE", 0.4, (0, 0, 0))])
    assert list(read_results(tmp_path / "r")[1]) == ["concrete", "pima_logistic_optimal", "wikitext2", "another"]


@pytest.mark.parametrize("fault", ["nothing", "columns", "facts", "twice", "marks"])
def test_faults_are_named(tmp_path, capsys, fault):
    folder, page = tmp_path / "results", tmp_path / "results.md"
    page.write_text("no marks\n" if fault == "marks" else PAGE)
    folder.mkdir()
    if fault != "nothing":
        rows = [row("SOURCE", 0.4, (0, 0, 0))] * (2 if fault == "twice" else 1)
        write_task(
            folder, "mnist", [{k: v for k, v in one.items() if (fault, k) != ("columns", "low")} for one in rows]
        )
    if fault == "facts":
        (folder / "mnist.json").unlink()
    assert run(folder, "--guide", str(page)) == 1
    message = {
        "nothing": "run a task first", "columns": "lacks the columns ['low']", "facts": "mnist.json is missing",
        "twice": "several rows for [['SOURCE', 'single']]", "marks": "'<!-- summary -->'",
    }  # fmt: skip
    assert message[fault] in capsys.readouterr().err
    assert not (tmp_path / "RESULTS.md").exists()


def test_what_is_committed_of_the_results_stays_small():
    folder = EXAMPLES / "paper" / "results"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path.name for path in files if path.suffix == ".html"]
    tables = [path for path in files if path.suffix == ".csv"]
    assert sum(path.stat().st_size for path in files) < 60_000 * len(tables)  # with a chart and panels each
