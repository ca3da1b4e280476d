import argparse
import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import source_proj as sp

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    for folder in (EXAMPLES, EXAMPLES / "paper"):
        monkeypatch.syspath_prepend(str(folder))


def decoder_run(n=10, queries=3, tokens=5):
    from _text import Recipe, Rows, Training
    from wikitext2 import Decoder, mean_loss

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(12, (n + queries, tokens), generator=generator)
    train, asked = (Rows({"input_ids": part, "labels": part}) for part in (ids[:n], ids[n:]))
    make = partial(Decoder, 12, tokens, 8, 1, 2)
    return Training(make, train, asked, sp.CausalLM(), mean_loss, Recipe(3, 4, 1e-3), torch.device("cpu"), 2)


def test_a_repetition_without_nothing_is_the_run(tmp_path):
    run = decoder_run()
    model = run.make_model()
    model.load_state_dict(run.record(3, tmp_path).final.load())
    expected = run.task.measurement(model, run.queries[slice(None)]).detach().numpy()
    np.testing.assert_allclose(run.repeat([np.arange(10)], 3)[0], expected, rtol=1e-5, atol=1e-6)


def test_the_unrolled_run_is_the_recorded_one(tmp_path):
    run = decoder_run()
    recorded, replayed = run.record(3, tmp_path).final.load(), run.unrolled(3).final_weights()
    for name, weights in replayed.items():
        # A key's bias has no gradient but rounding, of which Adam makes steps as large as of any.
        torch.testing.assert_close(weights, recorded[name], rtol=1e-5, atol=run.recipe.lr / 50)


def test_a_repetition_lacks_its_rows_and_nothing_else():
    """Against a plain loop: a batch's losses are summed over those that are there, and divided by all of its places."""
    run, kept = decoder_run(), np.array([0, 2, 3, 5, 6, 7])
    torch.manual_seed(3)
    model = run.make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=run.recipe.weight_decay)
    shuffled = torch.Generator().manual_seed(3)
    rates, ids = iter(run.recipe.rates(10)), run.rows.tensors["input_ids"]
    for _ in range(3):
        order = torch.randperm(10, generator=shuffled)
        for batch in (order[:4], order[4:8], order[8:]):
            optimizer.param_groups[0]["lr"] = next(rates)
            optimizer.zero_grad()
            losses = [
                torch.nn.functional.cross_entropy(model(ids[i : i + 1])[0, :-1], ids[i, 1:])
                for i in batch.tolist() if i in kept
            ]  # fmt: skip
            if losses:
                (torch.stack(losses).sum() / len(batch)).backward()
            optimizer.step()
    expected = run.task.measurement(model.eval(), run.queries[slice(None)]).detach().numpy()
    np.testing.assert_allclose(run.repeat([kept], 3)[0], expected, rtol=1e-4, atol=1e-5)


def test_chunks_are_cut_of_a_thousand_texts_at_a_time():
    from _gpt2 import chunks

    texts = [[i] * (i % 4) for i in range(2500)]
    rows = chunks([str(i) for i in range(2500)], lambda text: texts[int(text)], 16).tensors["input_ids"]
    parts = [[x for text in texts[start : start + 1000] for x in text] for start in (0, 1000, 2000)]
    assert rows.tolist() == [part[i : i + 16] for part in parts for i in range(0, len(part) - 15, 16)]


@pytest.mark.skipif(importlib.util.find_spec("rank_bm25") is None, reason="rank_bm25 not installed (extra paper-text)")
def test_words_match_where_they_are_the_same():
    from board import word_matches

    texts = ["the cat sat", "a dog ran far", "one two three four", "cats and dogs"]
    matches = word_matches(texts, ["dog ran", "three two"])
    assert matches.argmax(1).tolist() == [1, 2]


def test_the_board_judges_each_run_by_its_own_repetitions(tmp_path, monkeypatch):
    """Scores of runs in another order fit the outcomes less well: they are not those of any run."""
    import board as boards
    from test_paper_text import write_wikitext

    write_wikitext(tmp_path / "data", monkeypatch)
    monkeypatch.setattr(boards, "board", only(boards.board, {"SOURCE", "Exact unrolling"}))
    options = argparse.Namespace(
        data=tmp_path / "data", cache=tmp_path / "cache", results=tmp_path / "results", full=False, quick=True,
        methods=None, device=None, runs=2, draws=8, share=0.1, asked=4, dim=64, exact=True,
    )  # fmt: skip
    compared = boards.compare(options)
    exact = compared["Exact unrolling"]
    assert exact.scores.shape == (2 * 4, 24)
    assert exact.single.value > 0.5
    assert not (tmp_path / "results").exists()  # a miniature is not kept


def only(board, names):
    def chosen(*args):
        for candidate in board(*args):
            if candidate.method in names:
                yield candidate

    return chosen
