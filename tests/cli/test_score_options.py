"""Every option of every method works or is refused by name, as the methods' own signatures say; outputs are safe."""

import csv
import importlib
import inspect
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import typer
import zarr
from command_line import ASK, BUILD
from typer.testing import CliRunner

import source_proj as sp
from source_proj.attribution import streaming
from source_proj.attribution.attributor import Attributor
from source_proj.cli import app, executors
from source_proj.cli.asking import METHODS

OPTIONS = {
    "segments": ["1"],
    "curvature": ["empirical-fisher", "gauss-newton"],
    "damping": ["1", "noise", "off"],
    "blocks": ["1", "2"],
    "average": [None],
    "query_gradient": ["mean", "final"],
    "ridge": ["0.5"],
    "rank": ["2"],
    "damping_factor": ["0.2"],
}
MATRIX = [(method, name, value) for method in METHODS for name, values in OPTIONS.items() for value in values]


def test_the_matrix_has_every_option_of_every_method():
    """Arguments that the command line offers for all methods, or for none."""
    common = {"bank", "model", "task", "batch_size", "device", "executor", "progress"}
    in_python_alone = {"cache", "memory", "seed", "time_scale", "storage"}
    for made in METHODS.values():
        assert set(inspect.signature(made).parameters) - common - in_python_alone <= set(OPTIONS)


@pytest.mark.parametrize(("method", "name", "value"), MATRIX)
def test_an_option_works_where_the_method_has_it_and_is_refused_elsewhere(call, method, name, value):
    flag = f"--{name.replace('_', '-')}"
    given = [flag] if value is None else [flag, value]
    has = name in inspect.signature(METHODS[method]).parameters
    said = call("top-k", "bank", *ASK, "--method", method.value, "-k", "1", *given, code=0 if has else 2)
    if not has:
        assert f"{flag} has no meaning for --method {method.value}" in said


class FakeClient:
    """Dask's, as far as the command line knows it."""

    def __init__(self, address, timeout):
        if address != "tcp://scheduler:8786":
            raise OSError("nobody there")

    def __enter__(self):
        self.threads = ThreadPoolExecutor(2)
        return self

    def __exit__(self, *error):
        self.threads.shutdown()

    def get_executor(self):
        return self.threads


@pytest.mark.parametrize("given", [["--workers", "1"], ["--workers", "2"], ["--dask", "tcp://scheduler:8786"]])
def test_workers_change_no_score(call, tmp_path, monkeypatch, given):
    asked, original = [], executors.ProcessPoolExecutor
    monkeypatch.setattr(executors, "ProcessPoolExecutor", lambda n, context: asked.append(n) or ThreadPoolExecutor(n))
    monkeypatch.setitem(sys.modules, "distributed", SimpleNamespace(Client=FakeClient))
    threads = torch.get_num_threads()
    call("score", "bank", *ASK, "-o", tmp_path / "alone.npy")
    call("score", "bank", *ASK, "-o", tmp_path / "shared.npy", *given)
    np.testing.assert_allclose(content(tmp_path / "shared.npy"), content(tmp_path / "alone.npy"), rtol=1e-5, atol=1e-7)
    assert asked == ([2] if given == ["--workers", "2"] else [])
    assert (original, threads) == (ProcessPoolExecutor, torch.get_num_threads())


def test_workers_that_are_not_there_are_named(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", SimpleNamespace(Client=FakeClient))
    command = ["top-k", "bank", *ASK, "--dask", "tcp://nowhere:1"]
    assert "no Dask scheduler answers at --dask 'tcp://nowhere:1': nobody there" in call(*command, code=2)
    assert "--workers and --dask name different workers" in call(*command, "--workers", "2", code=2)


@pytest.mark.parametrize("ending", ["npy", "zarr", "csv", "parquet"])
def test_a_file_is_replaced_only_when_it_is_said(call, tmp_path, ending):
    out = tmp_path / f"scores.{ending}"
    call("score", "bank", *ASK, "-o", out)
    first = np.asarray(content(out))
    assert "exists" in call("score", "bank", *ASK, "--method", "tracin", "-o", out, code=2)
    assert np.array_equal(content(out), first)
    call("score", "bank", *ASK, "--method", "tracin", "-o", out, "--overwrite")
    assert not np.array_equal(content(out), first)


@pytest.mark.parametrize(
    ("ending", "chosen"), [("parquet", ["--most", "helpful"]), ("csv", ["--most", "harmful"]), ("zarr", ["--lowest"])]
)
def test_a_streamed_list_is_the_one_in_memory(call, tmp_path, scores, monkeypatch, ending, chosen):
    monkeypatch.setattr(streaming, "_MOST_QUERIES", 2)
    out, k = tmp_path / f"hits.{ending}", 5
    told = call("top-k", "bank", *ASK, *chosen, "-k", k, "--batch-size", "2", "-o", out, "--json")
    named = chosen[-1].removeprefix("--")
    assert (told["queries"], told["k"], told["list"], told["unit"]) == (3, k, named, scores.unit)
    held = {"helpful": scores.helpful, "harmful": scores.harmful, "lowest": scores.bottom_k}[named](k)
    frame = pd.read_csv(out) if ending == "csv" else sp.HitsFile(out).to_pandas()
    assert frame[["query_id", "train_id", "rank"]].equals(held.to_pandas()[["query_id", "train_id", "rank"]])
    np.testing.assert_allclose(frame["score"], held.scores.ravel(), rtol=1e-4)
    assert "exists" in call("top-k", "bank", *ASK, *chosen, "-o", out, code=2)
    assert "3 queries x 2 " in call("top-k", "bank", *ASK, *chosen, "-k", "2", "-o", out, "--overwrite")


def test_a_killed_list_goes_on_where_it_was(call, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_MOST_QUERIES", 1)
    made, search = [], Attributor.strongest_of

    def dying(self, terms, count, k, *, highest):
        if len(made) == 2:
            raise OSError("the disk is gone")
        made.append(count)
        return search(self, terms, count, k, highest=highest)

    asked = ["top-k", "bank", *ASK, "--most", "helpful", "-k", "4", "--batch-size", "1", "-o", tmp_path / "hits.csv"]
    call(*asked[:-1], tmp_path / "whole.csv")
    with monkeypatch.context() as patched:
        patched.setattr(Attributor, "strongest_of", dying)
        assert "the disk is gone" in call(*asked, code=1)
        assert not (tmp_path / "hits.csv").exists()
        with pytest.raises(AssertionError, match="the disk is gone"):
            call(*asked)  # the third query is all that is left
        made.clear()
        call(*asked)
    assert made == [1]
    assert (tmp_path / "hits.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_what_cannot_be_streamed_is_refused_before_any_work(call, tmp_path):
    asked = ["top-k", "bank", *ASK, "-o", tmp_path / "hits.parquet"]
    assert "--out holds one list" in call(*asked, code=2)
    assert "--html keeps all queries in memory" in call(*asked, "--lowest", "--html", tmp_path / "p.html", code=2)
    assert "--rerank keeps all queries" in call(*asked, "--lowest", "--rerank", "9", code=2)
    assert ".parquet or .zarr or .csv" in call(*asked[:-1], tmp_path / "hits.npy", "--lowest", code=2)
    assert "does not exist" in call(*asked[:-1], tmp_path / "absent" / "hits.csv", "--lowest", code=2)
    assert "k must lie in 1..40" in call(*asked, "--lowest", "-k", "41", code=2)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_ids_beside_is_not_replaced_either(call, tmp_path):
    (tmp_path / "scores.npy.json").write_text('{"mine": 1}')
    for options in ([], ["--overwrite"]):
        said = call("score", "bank", *ASK, "-o", tmp_path / "scores.npy", *options, code=2)
        assert "scores.npy.json exists" in said
    assert (tmp_path / "scores.npy.json").read_text() == '{"mine": 1}'
    assert not (tmp_path / "scores.npy").exists()


def test_a_file_of_the_users_with_the_same_stem_is_left_alone(call, tmp_path):
    (tmp_path / "scores.json").write_text("mine")
    for options in ([], ["--overwrite"]):
        call("score", "bank", *ASK, "-o", tmp_path / "scores.npy", *options)
    assert (tmp_path / "scores.json").read_text() == "mine"


def test_a_bank_is_never_replaced_by_scores(call, home, tmp_path):
    bank = tmp_path / "bank.zarr"
    shutil.copytree(home / "bank", bank)
    said = call("score", bank, *ASK, "-o", bank, "--overwrite", code=2)
    assert "bank.zarr exists" in said
    assert "never replaced" in said
    assert "whole" in call("verify", bank)


def content(path):
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".zarr":
        return zarr.open_array(path, mode="r")[...]
    if path.suffix == ".parquet":
        frame = pd.read_parquet(path)
        assert list(frame.columns) == ["query_id", "train_id", "rank", "score"]
        return frame.pivot(index="query_id", columns="train_id", values="score").to_numpy()
    with path.open(newline="") as file:
        return [list(map(float, row[1:])) for row in list(csv.reader(file))[1:]]


def test_clean_frees_the_fits_and_nothing_else(call):
    call("top-k", "bank", *ASK, "-k", "1")
    before = call("inspect", "bank", "--json")["bytes"]
    assert before["fits"] > 0
    assert call("clean", "bank", "--json")["bytes_freed"] == before["fits"]
    assert call("inspect", "bank", "--json")["bytes"] == {**before, "fits": 0}
    assert "whole" in call("verify", "bank")


def test_ids_of_strangers_reach_terminal_and_sheet_as_text(home, monkeypatch, tmp_path):
    monkeypatch.chdir(home)
    import mine

    ids = [f"\x1b[2J{i}" if i % 2 else f"=cmd|{i}" for i in range(40)]
    run = sp.Trajectory.from_recorder("run")
    sp.build(mine.model(), sp.Classification(), run, mine.train_set(), tmp_path / "bank", ids=ids, progress=False)
    shown = CliRunner().invoke(app, ["top-k", str(tmp_path / "bank"), *ASK, "-k", "40"]).stdout
    assert "\x1b" not in shown
    assert "\\x1b[2J1" in shown
    CliRunner().invoke(app, ["score", str(tmp_path / "bank"), *ASK, "-o", str(tmp_path / "s.csv")])
    with (tmp_path / "s.csv").open(newline="") as file:
        header = next(csv.reader(file))
    assert header[1:3] == ["'=cmd|0", "'\\x1b[2J1"]
    CliRunner().invoke(app, ["top-k", str(tmp_path / "bank"), *ASK, "--lowest", "-o", str(tmp_path / "hits.csv")])
    assert set(pd.read_csv(tmp_path / "hits.csv")["train_id"].str[:3]) <= {"'=c", "'\\x"}


def test_every_command_that_asks_offers_every_option():
    """`ask` reads them all: one that a command lacks would end it."""
    for name in ("score", "top-k", "explore"):
        offered = {option.name for option in typer.main.get_command(app).commands[name].params}
        assert set(OPTIONS) <= offered


def test_a_page_is_written_by_the_method_and_options_asked_for(call, tmp_path):
    pytest.importorskip("starlette", reason="the page is served by the explore extra")
    given = ["--method", "datainf", "--damping-factor", "0.2", "--static", tmp_path / "page"]
    assert "index.html" in call("explore", "bank", *ASK, *given)
    assert (tmp_path / "page" / "index.html").is_file()
    assert "exists" in call("explore", "bank", *ASK, *given, code=2)
    asked = ["explore", "bank", "--model", "no:model", "--queries", "no:queries"]  # which is not looked at yet
    assert "exists" in call(*asked, "--static", tmp_path / "page", code=2)
    (tmp_path / "a-file").touch()
    for place in (tmp_path / "a-file", tmp_path / "a-file" / "below" / "it"):
        assert "a-file is a file, and the page is a folder" in call(*asked, "--static", place, code=2)


def test_workers_are_a_plans_and_build_nothing(call):
    """A build with them only planned, and ended as one that is done."""
    assert "--workers is for source-proj plan; to build by" in call(
        "build", "elsewhere", *BUILD[2:], "--workers", 3, code=2
    )
    assert call("plan", "elsewhere", *BUILD[2:], "--workers", 3)


@pytest.mark.parametrize("word", ["--progress", "--no-progress"])
def test_a_plan_draws_bars_only_where_they_are_wanted(call, monkeypatch, word):
    told = []

    def planned(*_, progress, **__):
        told.append(progress)
        raise ValueError("planned")

    monkeypatch.setattr(importlib.import_module("source_proj.distribute"), "plan", planned)
    assert "planned" in call("plan", "elsewhere", *BUILD[2:], word, code=2)
    assert told == [word == "--progress"]
