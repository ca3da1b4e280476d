"""The command line, from a recorded run to scores, inspected and verified; and what it says when something is wrong."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from command_line import ARGUMENTS, ASK, BUILD
from typer.testing import CliRunner

import source_proj as sp
from source_proj.bank.codecs import codec_names
from source_proj.cli import app, main
from source_proj.sketch.projections import kinds


@pytest.mark.parametrize("extra", [[], ["--task", "mine:margin"], ["--sampled-fisher", "1"], ["--parameters", "0.*"]])
def test_build_makes_the_bank_that_the_library_makes(call, tmp_path, extra):
    made = call("build", tmp_path / "bank", *ARGUMENTS, *extra, "--json")
    assert made["rows"] == 40
    assert made["finalized"] is True
    bank = sp.open(tmp_path / "bank")
    assert bank.sketch == sp.Sketch(dim=64)
    assert bank.task_spec["name"] == ("margin" if "mine:margin" in extra else "classification")
    assert bank.stages[0].draws == ("--sampled-fisher" in extra)
    assert len(bank.space_spec["names"]) == (2 if "0.*" in extra else 4)


@pytest.mark.parametrize(
    ("where", "segments"),
    [
        (["--trajectory", "mine:trajectory"], [[0], [1, 2]]),
        (
            ["--lr", "0.1", "--momentum", "0.5"]
            + [f"--checkpoint={step}=run/step_000000{step}.pt" for step in (30, 10, 20)],
            [[0, 1, 2]],
        ),
    ],
)
def test_trajectories_come_from_elsewhere_too(call, tmp_path, where, segments):
    base = [one for one in ARGUMENTS if one not in ("--recorder", "run", "--segments", "2")]
    call("build", tmp_path / "bank", *base, *where)
    (stage,) = sp.open(tmp_path / "bank").trajectory.stages
    assert stage.steps == (10, 20, 30)
    assert [list(group) for group in stage.segments] == segments
    assert stage.lr_integrals == pytest.approx((1.0, 2.0, 3.0))
    assert stage.optimizer == sp.SGD(momentum=0.5)


def test_a_bank_built_in_parts_equals_one_built_at_a_stretch(call, tmp_path, home):
    bank = tmp_path / "bank"
    first = call("build", bank, *ARGUMENTS, "--shard", "0/2", "--json")
    assert first["finalized"] is False
    facts = call("inspect", bank, "--json")
    assert facts["finalized"] is False
    assert facts["fingerprint"] is None
    shards = facts["stages"][0]["checkpoints"]
    assert sum(one["shards"] - one["shards_done"] for one in shards) == len(facts["missing"]) > 0
    assert "unfinished" in call("inspect", bank)
    assert "missing: " in call("inspect", bank)
    assert "unfinished" in call("top-k", bank, *ASK, code=1)
    assert "lacks" in call("finalize", bank, code=1)
    call("build", bank, *ARGUMENTS, "--shard", "1/2")
    assert call("finalize", bank, "--json")["finalized"] is True
    assert sp.open(bank).fingerprint == sp.open(home / "bank").fingerprint


def test_examples_are_appended_in_parts(call, home, tmp_path):
    (home / "more.py").write_text(
        "from torch.utils.data import TensorDataset\nimport mine\n"
        "def part():\n    return TensorDataset(mine.inputs[:24], mine.labels[:24])\n"
        "def rest():\n    return TensorDataset(mine.inputs[24:40], mine.labels[24:40])\n"
    )
    bank, rest = tmp_path / "bank", ("--model", "mine:model", "--data", "more:rest", "--batch-size", "8")
    call("build", bank, *[word.replace("mine:train_set", "more:part") for word in ARGUMENTS])
    said = call("append", bank, *rest, "--shard-rows", "8", "--shard", "0/2", "--no-progress")
    assert "40 in all, unfinished: append its other parts" in said
    call("append", bank, *rest, "--shard-rows", "8", "--shard", "1/2", "--no-progress")
    assert call("finalize", bank, "--json")["rows"] == 40
    told = call("append", bank, *rest, "--shard-rows", "8", "--no-progress", "--json")
    assert (told["appended"], told["examples"], told["finalized"]) == (0, 40, True)
    found, expected = (call("top-k", each, *ASK, "--json")["queries"] for each in (bank, home / "bank"))
    for query, other in zip(found, expected, strict=True):
        assert [one["id"] for one in query["train"]] == [one["id"] for one in other["train"]]
    assert "one of the bank's stages ['train']" in call("append", bank, *rest, "--stage", "second", code=2)
    assert "--data is missing" in call("append", bank, "--model", "mine:model", code=2)


@pytest.mark.usefixtures("home")
def test_scores_are_written_with_their_ids(call, tmp_path, scores):
    told = call("score", "bank", *ASK, "--out", tmp_path / "s.npy", "--json")
    assert told["queries"] == 3
    assert told["train"] == 40
    assert told["unit"] == "logit margin"
    assert np.array_equal(np.load(tmp_path / "s.npy"), scores.values)
    facts = json.loads((tmp_path / "s.npy.json").read_text())
    assert facts["train_ids"] == list(range(40))
    assert facts["unit"] == "logit margin"

    assert "including the example raised" in call("score", "bank", *ASK, "--out", tmp_path / "s.zarr")
    assert np.array_equal(zarr.open_array(tmp_path / "s.zarr", mode="r")[:], scores.values)

    call("score", "bank", *ASK, "-o", tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["query", *map(str, range(40))]
    assert [line[0] for line in lines] == ["0", "1", "2"]
    assert np.array_equal(np.array([line[1:] for line in lines], dtype=np.float32), scores.values)


def test_top_k_prints_the_strongest(call, scores):
    found = call("top-k", "bank", *ASK, "-k", "4", "--json")
    assert found["unit"] == "logit margin"
    expected = scores.top_k(4)
    for query, ids, values in zip(found["queries"], expected.ids, expected.scores, strict=True):
        assert [one["id"] for one in query["train"]] == ids
        assert [one["score"] for one in query["train"]] == pytest.approx(values.tolist())
    lowest = call("top-k", "bank", *ASK, "-k", "4", "--lowest", "--json")
    assert [one["id"] for one in lowest["queries"][0]["train"]] == scores.bottom_k(4).ids[0]

    header, *lines = call("top-k", "bank", *ASK, "-k", "2").splitlines()
    assert "log-odds" in header  # the unit, in words
    blocks = [[line.split() for line in lines[start + 1 : start + 8]] for start in range(0, 24, 8)]
    for query, (name, helpful, *rest) in enumerate(blocks):
        assert name[:3] == ["query", str(query), "label"]
        assert (helpful, rest[2]) == (["most", "helpful"], ["most", "harmful"])
        assert [int(entry[2]) for entry in rest[:2]] == scores.helpful(2).ids[query]
        assert [int(entry[2]) for entry in rest[3:5]] == scores.harmful(2).ids[query]


def test_inspect_says_how_far_scores_can_be_trusted(call):
    found = call("inspect", "bank", "--fidelity", "--json")["fidelity"]
    assert len(found["correlation"]) == len(found["leakage"]) > 0
    shown = call("inspect", "bank", "--fidelity")
    assert f"effective dimension {found['effective_dimension']:.0f};" in shown
    assert "without a sketch at the same damping; k = " in shown
    assert "fidelity" not in call("inspect", "bank", "--json")


def test_top_k_corrects_scores_by_whole_gradients(call):
    asked = ("-k", "2", "--rerank", "8", "--data", "mine:train_set")
    found = call("top-k", "bank", *ASK, *asked, "--json")
    import mine

    source = sp.Source(sp.open("bank"), model=mine.model(), progress=False)
    hits = source.top_k(mine.queries(), 2, rerank=8, train=mine.train_set())
    assert [[entry["id"] for entry in query["train"]] for query in found["queries"]] == hits.ids
    assert found["reranked"]["helpful"] == hits.reranked.facts()
    assert "recall of the bank's own list" in call("top-k", "bank", *ASK, *asked)
    assert "--rerank has no meaning for TracIn" in call("top-k", "bank", *ASK, *asked, "--method", "tracin", code=2)
    assert "train=" in call("top-k", "bank", *ASK, *asked[:4], code=2)


def test_top_k_writes_a_page(call, tmp_path, scores):
    page = tmp_path / "answer.html"
    call("top-k", "bank", *ASK, "-k", "3", "--most", "harmful", "--html", page, "--data", "mine:train_set")
    assert page.read_text(encoding="utf-8").count('class="tile"') == (scores.harmful(3).scores < 0).sum()
    assert "exists" in call("top-k", "bank", *ASK, "--html", page, code=2)
    assert "does not exist" in call("top-k", "bank", *ASK, "--html", tmp_path / "absent" / "page.html", code=2)


def test_data_that_are_not_the_training_set_are_not_shown_as_such(call):
    refused = call("top-k", "bank", *ASK, "--data", "mine:queries", code=1)
    assert "--data 'mine:queries' gives 3 examples and the bank has 40: name its training set" in refused
    refused = call("top-k", "bank", *ASK, "--data", "mine:train_set", "--picture", "8x8", code=2)
    assert "an input of 5 numbers has no shape (8, 8): give one of as many" in refused


def test_questions_without_labels_are_about_the_prediction(call):
    import mine

    source = sp.Source(sp.open("bank"), model=mine.model(), progress=False)
    inputs, _ = mine.queries().tensors
    asked = ["--model", "mine:model", "--no-progress", "-k", "2", "--json", "--data", "mine:train_set"]
    plain = call("top-k", "bank", *asked, "--queries", "mine:plain")
    told = call("top-k", "bank", *asked, "--queries", "mine:queries", "--target", "predicted")
    expected = source.helpful(inputs, 2)
    for query, (row, same) in enumerate(zip(plain["queries"], told["queries"], strict=True)):
        assert [entry["id"] for entry in row["train"]] == expected.ids[query]
        assert row["train"] == same["train"]
        answer = expected.shown.answers[query]
        assert (row["predicted"], row["probability"]) == (str(answer.value), pytest.approx(answer.probability))
        assert row["train"][0]["label"] == str(int(mine.labels[expected.ids[query][0]]))
    chosen = call("top-k", "bank", *asked, "--queries", "mine:queries", "--target", "1")
    assert {row["asked_about"] for row in chosen["queries"]} == {"1"}
    assert not any("predicted" in row for row in chosen["queries"])


def test_help_names_all_kinds_of_sketches_and_of_storage():
    text = " ".join(CliRunner().invoke(app, ["build", "--help"], terminal_width=300).stdout.split())
    for name in (*kinds(), *codec_names()):
        assert re.search(rf"\b{name}\b", text), name
    for panel in ("The training run", "Model and data as files", "Sketch and storage", "Running"):
        assert panel in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--method", "tracin"], lambda bank, model: sp.TracIn(bank, model=model)),
        (["--method", "hydra"], lambda bank, model: sp.Hydra(bank, model=model)),
        (["--query-gradient", "mean"], lambda bank, model: sp.Source(bank, model=model, query_gradient="mean")),
        (["--method", "trak"], lambda bank, model: sp.Trak(bank, model=model)),
        (["--method", "arnoldi", "--rank", "3"], lambda bank, model: sp.ArnoldiInfluence(bank, model=model, rank=3)),
        (
            ["--method", "datainf", "--damping-factor", "0.5"],
            lambda bank, model: sp.DataInf(bank, model=model, damping_factor=0.5),
        ),
        (["--method", "grad-dot"], lambda bank, model: sp.GradDot(bank, model=model)),
        (["--method", "grad-cos"], lambda bank, model: sp.GradCos(bank, model=model)),
        (
            ["--method", "influence", "--average", "--damping", "0.01", "--query-gradient", "final"],
            lambda bank, model: sp.InfluenceFunction(
                bank, model=model, average=True, damping=0.01, query_gradient="final"
            ),
        ),
        (
            ["--segments", "[[0, 1], [2]]", "--curvature", "gauss-newton", "--damping", "off", "--blocks", "2"],
            lambda bank, model: sp.Source(
                bank, model=model, segments=[[0, 1], [2]], curvature="gauss_newton", damping=None, blocks=2
            ),
        ),
        (["--segments", "1"], lambda bank, model: sp.Source(bank, model=model, segments=1)),
    ],
)
def test_methods_and_their_options_reach_the_library(call, tmp_path, options, expected):
    import mine

    call("score", "bank", *ASK, *options, "-o", tmp_path / "s.npy")
    wanted = expected(sp.open("bank"), mine.model()).score(mine.queries())
    assert np.array_equal(np.load(tmp_path / "s.npy"), np.asarray(wanted))


def test_several_banks_are_averaged(call, tmp_path, scores):
    call("score", "bank", "bank", *ASK, "-o", tmp_path / "s.npy")
    assert np.allclose(np.load(tmp_path / "s.npy"), scores.values, rtol=1e-6)


def test_inspect_shows_what_is_there(call):
    facts = call("inspect", "bank", "--json")
    assert facts["finalized"] is True
    assert facts["fingerprint"] == sp.open("bank").fingerprint
    assert facts["sketch"]["dim"] == 64
    assert facts["parameters"] == {"0.weight": [6, 5], "0.bias": [6], "2.weight": [3, 6], "2.bias": [3]}
    (stage,) = facts["stages"]
    assert [one["step"] for one in stage["checkpoints"]] == [10, 20, 30]
    assert all(one["shards_done"] == one["shards"] for one in stage["checkpoints"])
    assert facts["missing"] == []
    text = call("inspect", "bank")
    for word in (
        "complete",
        "40 training examples, int8",
        "classification",
        "4 of 4 parameters, 57 of 57 numbers",
        "momentum 0.5",
    ):
        assert word in text


def test_verify_tells_whole_from_damaged(call, tmp_path, home):
    assert call("verify", "bank", "--json")["ok"] is True
    assert "whole" in call("verify", "bank")
    call("build", tmp_path / "bank", *ARGUMENTS)
    victim = max((tmp_path / "bank").rglob("c*"), key=lambda path: path.stat().st_size if path.is_file() else -1)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    text = call("verify", tmp_path / "bank", code=1)
    assert victim.name in text
    assert "1 problem;" in text
    report = json.loads(call("verify", tmp_path / "bank", "--json", code=1))
    assert report["ok"] is False
    assert len(report["problems"]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["top-k", "nowhere", *ASK], 1, "nowhere"),
        (["inspect", "run"], 1, "run"),
        (["top-k", "bank", *ASK, "-k", "41"], 2, r"k must lie in 1\.\.40.*got 41"),
        (["top-k", "bank", "--model", "mine:absent", "--queries", "mine:queries"], 2, "mine has no 'absent'"),
        (["top-k", "bank", "--model", "mine:other_model", "--queries", "mine:queries"], 1, r"\(6, 5\)|\[6, 5\]"),
        (["top-k", "bank", *ASK, "--task", "regression"], 1, "regression"),
        (["top-k", "bank", *ASK, "--method", "tracin", "--segments", "2"], 2, "--segments has no meaning for --method"),
        (["top-k", "bank", *ASK, "--method", "grad-dot", "--average"], 2, "--average has no meaning"),
        (["top-k", "bank", *ASK, "--curvature", "sampled-fisher"], None, "sampled"),
        (["top-k", "bank", "--model", "mine:model", "--queries", "mine:narrow"], 1, "cannot take the first example"),
        (["score", "bank", *ASK, "-o", "scores.txt"], 2, r"\.npy, \.zarr, \.csv"),
        (["top-k", "bank", *ASK, "--most", "helpful", "-o", "h.txt"], 2, r"--out of hits must end in .*, got 'h\.txt'"),
        (["score", "bank", *ASK, "-o", "absent/scores.npy"], 2, "does not exist"),
        ([*BUILD, "--sketch-seed", "5"], 1, "seed"),
        ([*BUILD, "--task-option", "label_smoothing=0.1"], 1, r"settings: task\.label_smoothing is 0\.0 there[^;]*$"),
        ([*BUILD, "--no-resume"], None, "bank"),
        (["build", "new", *ARGUMENTS, "--sketch-kind", "gaussian"], 2, "gaussian"),
        (["build", "new", *ARGUMENTS, "--shard", "2/2"], 2, "i/n"),
        (["build", "new", *ARGUMENTS[:-3], "--data", "mine:broken", "--no-progress"], 1, r"\[7\]|\b7\b"),
        (["build", "new", "--model", "mine:model", "--data", "mine:train_set"], 2, "--recorder DIR"),
        (["demo", "--remove", "0"], 2, "remove"),
    ],
)
def test_errors_are_one_line_without_a_traceback(home, monkeypatch, arguments, code, message):
    monkeypatch.chdir(home)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == (code or result.exit_code) != 0
    assert result.stdout == ""
    assert re.search(message, result.stderr), result.stderr
    if arguments[0] != "demo":  # there typer itself refuses, with its usage
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: ")


def test_debug_shows_the_traceback(home, monkeypatch):
    monkeypatch.chdir(home)
    result = CliRunner().invoke(app, ["--debug", "inspect", "nowhere"])
    assert isinstance(result.exception, sp.BankError)


def test_help_names_every_command():
    result = CliRunner().invoke(app, ["--help"])
    for name in ("build", "finalize", "score", "top-k", "inspect", "verify", "clean", "demo"):
        assert name in result.stdout
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_help_breaks_no_line_where_the_source_does():
    text = CliRunner().invoke(app, ["build", "--help"], terminal_width=300).stdout
    assert "SOURCE_PROJ_SHARD=I/N: all processes build" in text


def test_help_names_the_default_curvature_of_every_task():
    text = " ".join(CliRunner().invoke(app, ["score", "--help"], terminal_width=300).stdout.replace("│", "").split())
    assert "gauss-newton for regression, sampled-fisher for language models" in text


def test_a_bank_of_one_checkpoint_says_what_more_would_bring(call, tmp_path):
    base = [one for one in ARGUMENTS if one not in ("--recorder", "run", "--segments", "2")]
    for steps in ([30], [10, 30]):
        weights = [f"--checkpoint={step}=run/step_000000{step}.pt" for step in steps]
        said = call("build", tmp_path / f"bank{len(steps)}", *base, "--lr", "0.1", *weights)
        assert ("one checkpoint" in said) == (len(steps) == 1)


def test_python_runs_the_package():
    shown = subprocess.run(
        [sys.executable, "-m", "source_proj", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == sp.__version__


def test_version():
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == sp.__version__


def test_a_real_process_prints_json_alone(home, monkeypatch, capfd):
    """Progress and warnings stay off standard output; the current directory is importable."""
    done = subprocess.run(
        [sys.executable, "-c", "from source_proj.cli import main; main()", "top-k", "bank", *ASK[:-1], "--json"],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(Path(sp.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["queries"]) == 3
    monkeypatch.setattr(sys, "argv", ["source-proj", "inspect", str(home / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    assert (ended.value.code, said.out) == (1, "")
    assert "nowhere" in said.err
    assert "Traceback" not in said.err


def test_a_reader_who_has_seen_enough_is_no_error(home):
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", "from source_proj.cli import main; main()", "inspect", "bank", "--json"],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(Path(sp.__file__).parent.parent)},
        stdout=written,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    os.close(written)
    assert done.stderr == ""
