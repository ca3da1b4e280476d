"""The demo runs, goes on where it was stopped, and tells the truth when its claim fails."""

import json
import re
from importlib import import_module

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from source_proj.attribution.words import signed
from source_proj.cli import app
from source_proj.demo import Removal, load_digits, make_network, retrain_without, run, train, verdict
from source_proj.demo.digits import checkpoint_steps, make_optimizer
from source_proj.demo.run import choose
from source_proj.demo.show import Answer, check_text
from source_proj.task import Classification

for extra in ("sklearn", "jinja2", "PIL"):
    pytest.importorskip(extra)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """One demo with the least retraining, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    lines = []
    found = run(folder, pairs=2, remove=30, say=lines.append, progress=False)
    return folder, found, "\n".join(lines)


def test_demo_shows_what_it_found(shown):
    folder, found, text = shown
    assert found.accuracy > 0.9
    assert found.page == folder / "report.html"
    page = found.page.read_text(encoding="utf-8")
    assert page.count("<img") == 4 * (1 + 5 + 5)
    assert page.count('class="shares"') == 4 * 10
    assert np.allclose(found.parts.total(), found.scores.values, atol=1e-4)
    for answer in found.answers:
        assert f"query {answer.query} ({answer.note}): a {answer.label}, answered {answer.prediction}" in text
        assert f"Query {answer.query}" in page
    for removal in found.removals:
        assert removal.removed == 30
        assert len(removal.changes) == 2
        assert verdict(removal) in text
        assert f"predicted {signed(removal.predicted)}, came {signed(removal.actual)}" in text
    assert found.removals[0].predicted < 0 < found.removals[1].predicted


def test_predictions_are_those_of_the_scores(shown):
    _, found, _ = shown
    first = found.scores.values[0]
    assert found.removals[0].predicted == pytest.approx(-np.sort(first)[::-1][:30].sum(), rel=1e-5)
    assert found.removals[1].predicted == pytest.approx(-np.sort(first)[:30].sum(), rel=1e-5)


def test_queries_are_chosen_by_certainty(shown):
    _, found, _ = shown
    digits, model = load_digits(), make_network()
    train(model, make_optimizer(model), digits.train_set)
    assert choose(model, digits) == found.answers  # the recorded run is this very run
    with torch.no_grad():
        margins = Classification().measurement(model, digits.test_set.tensors)
    wrong = model(digits.test_set.tensors[0]).argmax(1) != digits.test_set.tensors[1]
    assert found.answers[0].margin == margins[wrong].max()
    assert found.answers[0].prediction != found.answers[0].label
    assert abs(found.answers[1].margin) == margins[~wrong].abs().min()
    assert len({answer.query for answer in found.answers}) == 4


def test_a_second_demo_in_the_same_folder_finds_its_work_done(shown):
    folder, found, _ = shown
    stamps = {path: path.stat().st_mtime_ns for kind in ("run", "bank") for path in (folder / kind).rglob("*.*")}
    result = CliRunner().invoke(app, ["demo", str(folder), "--pairs", "2", "--remove", "30", "--no-progress", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert [query["id"] for query in facts["queries"]] == [answer.query for answer in found.answers]
    assert facts["queries"][0]["helpful"][0]["score"] == pytest.approx(float(found.scores.values[0].max()), rel=1e-5)
    for check, removal in zip(facts["checks"], found.removals, strict=True):
        assert check["actual"] == pytest.approx(removal.actual)
        assert check["holds"] == removal.holds
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_pairs_differ_by_what_is_left_out_alone():
    digits = load_digits()
    changes = retrain_without(digits, 0, {"nothing": [], "much": range(700)}, pairs=2, progress=False)
    assert changes["nothing"] == (0.0, 0.0)
    assert all(abs(change) > 0.01 for change in changes["much"])


def test_what_is_left_out_has_no_effect_at_all():
    digits = load_digits()
    outputs = []
    for value in (0.0, 1.0):
        inputs, targets = (tensor.clone() for tensor in digits.train_set.tensors)
        inputs[:40] = value
        model = make_network(3)
        changed = torch.utils.data.TensorDataset(inputs, targets)
        train(model, make_optimizer(model), changed, seed=3, left_out=range(40))
        outputs.append(model(digits.test_set.tensors[0]))
    assert torch.equal(*outputs)


def test_networks_leave_the_global_random_state_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    make_network(0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_checkpoints_are_spread_over_the_whole_run():
    steps = checkpoint_steps(1438)
    assert steps[-1] == 15 * 23
    assert len(steps) == 6
    assert max(np.diff([0, *steps])) - min(np.diff([0, *steps])) <= 1


def test_removal_gives_mean_and_standard_error():
    changes = (0.5, -1.0, 2.0, 0.25)
    removal = Removal("r", 1, 1.0, changes)
    assert removal.actual == pytest.approx(np.mean(changes))
    assert removal.error == pytest.approx(np.std(changes, ddof=1) / 2)


@pytest.mark.parametrize(
    ("predicted", "changes", "named", "holds"),
    [
        (-2.0, (-1.0, -1.1), (), True),
        (-2.0, (1.0, 1.1), (), False),
        (-2.0, (-1.0, 1.1), (), False),
        (0.0, (1.0, 1.1), (), False),
        (0.1, (0.2, 0.1), ((-9.0, -9.2), (8.0, 7.9)), True),
        (0.1, (0.2, 0.1), ((-9.0, -9.2), (0.2, 0.3)), False),
        (0.1, (9.2, 9.1), ((-9.0, -9.2),), False),
        (0.1, (-9.2, 9.1), ((-9.0, -9.2),), False),  # nothing on the average, but for the noise
    ],
)
def test_a_failed_claim_is_called_so(predicted, changes, named, holds):
    removal = Removal("without some", 5, predicted, changes, named)
    assert removal.holds is holds
    text = check_text(Answer(3, 1, 1, 0.5, "n"), [removal], "logit margin")
    assert ("FAIL" in text) is not holds
    assert ("the signs of the named held" in text) is holds
    assert ("hold" in verdict(removal).lower()) is holds


@pytest.mark.parametrize("options", [{"pairs": 1}, {"remove": 0}, {"remove": 501}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must .*got {re.escape(str(*options.values()))}"):
        run(**options)


def test_only_the_demos_own_page_is_replaced_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = []

    def begin(_self, target, *_):
        begun.append(target)

    monkeypatch.setattr(import_module("source_proj.demo.run")._Run, "all", begin)
    for name in ("source-proj-demo.html", "report.html", "mine.html"):
        (tmp_path / name).write_text("there")
    run(progress=False)
    run(tmp_path, progress=False)
    with pytest.raises(FileExistsError, match=r"mine\.html"):
        run(page="mine.html", progress=False)
    run(page="mine.html", overwrite=True, progress=False)
    assert [target.name for target in begun] == ["source-proj-demo.html", "report.html", "mine.html"]
