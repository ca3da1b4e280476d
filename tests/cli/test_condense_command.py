"""``condense``, and what is asked of the bank that it writes."""

import pytest
from command_line import ASK

import source_proj as sp
from source_proj.integrations.text_settings import TextSettings


def test_a_condensed_bank_gives_the_same_list_from_fewer_bytes(call, home, tmp_path):
    made = call("condense", home / "bank", tmp_path / "small", "--storage", "float32", "--no-progress", "--json")
    assert made["rows"] == 40
    assert made["bytes"] == sum(sp.open(tmp_path / "small").nbytes().values())
    expected, found = (call("top-k", bank, *ASK, "-k", "5", "--json") for bank in (home / "bank", tmp_path / "small"))
    for before, after in zip(expected["queries"], found["queries"], strict=True):
        for name in ("helpful", "harmful"):
            assert [hit["id"] for hit in after[name]] == [hit["id"] for hit in before[name]]
            scores = [[hit["score"] for hit in own[name]] for own in (before, after)]
            assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    assert "40 rows" in call("condense", home / "bank", tmp_path / "one", "--segments", "1", "--no-progress")
    assert sp.open(tmp_path / "one").stages[0].n_checkpoints == 1
    assert "one row for each example" in call("condense", tmp_path / "one", tmp_path / "two", code=1)
    assert "'sampled_fisher' needs rows" in call(
        "condense", home / "bank", tmp_path / "two", "--curvature", "sampled-fisher", code=2
    )


def test_what_a_bank_knows_of_its_texts_comes_along(call, home, tmp_path):
    bank = call("build", tmp_path / "bank", *BUILD_AGAIN, "--json")["bank"]
    settings = TextSettings("model", text="sentence")
    settings.write(bank, {"dataset": "train.csv"}, "0" * 64)
    call("condense", bank, tmp_path / "small", "--no-progress")
    assert TextSettings.read(tmp_path / "small") == settings


BUILD_AGAIN = ["--model", "mine:model", "--data", "mine:train_set", "--recorder", "run", "--sketch-dim", "16"]
