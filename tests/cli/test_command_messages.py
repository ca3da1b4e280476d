"""What commands say of URLs, of what is left to do, and of weights that are not there."""

import shutil

import pytest
import torch
from command_line import ARGUMENTS, ASK
from torch.utils.data import TensorDataset

import source_proj as sp


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["score", "bank", *ASK, "-o", "s3://bucket/x.npy"], "--out 's3://bucket/x.npy' is a URL, and only banks lie"),
        (["top-k", "bank", *ASK, "--html", "s3://bucket/x.html"], "--html 's3://bucket/x.html' is a URL"),
        (["top-k", "bank", *ASK, "--most", "helpful", "-o", "gs://b/x.parquet"], "--out 'gs://b/x.parquet' is a URL"),
        (["explore", "bank", *ASK, "--static", "s3://bucket/page"], "'s3://bucket/page/index.html' is a URL"),
    ],
)
def test_answers_are_not_written_to_urls(call, command, said):
    if command[0] == "explore":
        pytest.importorskip("starlette")
        pytest.importorskip("uvicorn")
    assert said in " ".join(call(*command, code=2).split())


def test_score_says_how_many_queries_it_did_not_show(call, home, tmp_path):
    (home / "asked.py").write_text("import mine\ndef five():\n    return mine.inputs[:5]\n")
    ask = ["--model", "mine:model", "--no-progress", "-o", tmp_path / "scores.npy", "--overwrite"]
    said = call("score", "bank", *ask, "--queries", "asked:five")
    assert f"… and 2 more queries: {tmp_path / 'scores.npy'} has all" in said
    assert said.index("query 2") < said.index("… and 2 more") < said.index("named by their ids")
    assert "more quer" not in call("score", "bank", *ask, "--queries", "mine:queries")


def test_the_last_part_of_a_build_says_that_all_rows_are_there(call, tmp_path):
    bank = tmp_path / "bank"
    first = call("build", bank, *ARGUMENTS, "--shard", "0/2")
    last = call("build", bank, *ARGUMENTS, "--shard", "1/2")
    assert "unfinished: build its other parts, then run source-proj finalize" in first
    assert "unfinished: all rows are there, run source-proj finalize" in last


def test_ids_that_are_strings_are_appended_in_python(call, home, tmp_path):
    import mine

    run = sp.Trajectory.from_recorder(home / "run")
    names, path = [f"n{i}" for i in range(40)], tmp_path / "bank"
    bank = sp.build(mine.model(), sp.Classification(), run, mine.train_set(), path, ids=names, progress=False)
    command = ["append", path, "--model", "mine:model", "--data", "mine:queries", "--no-progress"]
    said = " ".join(call(*command, code=2).split())
    assert "give ids for the new examples too, in Python by bank.append(..., ids=[...]): source-proj append can" in said
    assert bank.append(mine.model(), sp.Classification(), mine.queries(), ids=["a", "b", "c"], progress=False) == 3


def test_groups_are_a_column_of_the_validation_set(call):
    for option in ("--group-column", "--weight-column"):
        said = " ".join(call("curate", "harmful", "bank", *ASK, option, "topic", code=2).split())
        assert f"{option} 'topic' names a column of --dataset, and there is none: give the validation set by" in said


def test_weights_that_are_not_there_are_named(call, home, tmp_path):
    import mine

    run, bank = tmp_path / "run", tmp_path / "bank"
    shutil.copytree(home / "run", run)
    trajectory = sp.Trajectory.from_recorder(run)
    sp.build(mine.model(), sp.Classification(), trajectory, mine.train_set(), bank, progress=False)
    assert "not there" not in call("inspect", bank) + call("verify", bank)
    moved = tmp_path / "elsewhere"  # with the weights beside it, as they were
    moved.mkdir()
    for folder in (run, bank):
        folder.rename(moved / folder.name)
    facts = call("inspect", moved / "bank", "--json")
    assert facts["missing_weights"] == call("verify", moved / "bank", "--json")["missing_weights"] == []
    assert all(entry["path"].startswith(str(moved)) for entry in facts["stages"][0]["checkpoints"])
    shutil.rmtree(moved / "run")
    facts, said = call("inspect", moved / "bank", "--json"), call("inspect", moved / "bank")
    checkpoints = facts["stages"][0]["checkpoints"]
    assert facts["missing_weights"] == [entry["path"] for entry in checkpoints]
    assert not any(entry["there"] for entry in checkpoints)
    assert said.count("(not there)") == len(checkpoints) > 1
    for words in (said, call("verify", moved / "bank")):
        assert f"{len(checkpoints)} files of weights not there, such as {checkpoints[0]['path']}: queries" in words
    assert "whole" in words


def test_weights_within_the_bank_are_there(call, tmp_path):
    model = torch.nn.Linear(2, 2)
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
    data = TensorDataset(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
    sp.build(model, sp.Classification(), run, data, tmp_path / "bank", sketch=sp.Sketch(6), progress=False)
    assert call("inspect", tmp_path / "bank", "--json")["missing_weights"] == []
    assert "in the bank\n" in call("inspect", tmp_path / "bank")
