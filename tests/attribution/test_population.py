"""What is predicted of a removal does not depend on which scores it is asked of: all, some, sums or means of them."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import source

import source_proj as sp
from source_proj.attribution.scores import Scores


def scores_of(sizes, queries=3, seed=0):
    values = np.random.default_rng(seed).standard_normal((queries, sum(sizes)))
    return Scores(values, range(queries), [f"z{i}" for i in range(sum(sizes))], unit="u", stage_sizes=sizes)


def by_hand(scores, gone, sizes):
    """The formula of the docstring of ``predict_removal``, an example at a time."""
    change, stop = np.zeros(len(scores)), 0
    for size in sizes:
        start, stop = stop, stop + size
        out = [z for z in range(start, stop) if scores.train_ids[z] in gone]
        for z in range(start, stop):
            change += scores.values[:, z] * (-1 if z in out else len(out) / (size - len(out)))
    return change


@settings(max_examples=60)
@given(data=st.data(), sizes=st.lists(st.integers(2, 5), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_groups_predict_what_their_examples_do(data, sizes, seed):
    scores = scores_of(sizes, seed=seed)
    names = data.draw(st.lists(st.sampled_from("abc"), min_size=sum(sizes), max_size=sum(sizes)))
    groups = {name: [i for i, own in zip(scores.train_ids, names, strict=True) if own == name] for name in set(names)}
    grouped = scores.group(groups)
    twice = grouped.group({"both": sorted(groups)[:2]})
    for some, chosen in ((grouped, sorted(groups)[:1]), (grouped, sorted(groups)[:2]), (twice, ["both"])):
        gone = {i for name in sorted(groups)[: 2 if some is twice else len(chosen)] for i in groups[name]}
        left = np.array([i not in gone for i in scores.train_ids])
        if all(part.any() for part in np.split(left, np.cumsum(sizes)[:-1])):
            change = some.predict_removal(chosen, renormalize=True)
            np.testing.assert_allclose(change.values, by_hand(scores, gone, sizes), atol=1e-12)
            np.testing.assert_allclose(
                change.values, scores.predict_removal(sorted(gone), renormalize=True).values, atol=1e-12
            )
            assert change.n_removed == len(gone)
        else:
            with pytest.raises(ValueError, match="nothing is left to renormalize to"):
                some.predict_removal(chosen, renormalize=True)
        np.testing.assert_allclose(
            some.predict_removal(chosen).values, scores.predict_removal(sorted(gone)).values, atol=1e-12
        )


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(3, 5), min_size=1, max_size=3), seed=st.integers(0, 99), queries=st.integers(1, 3))
def test_corners_and_means_predict_what_all_scores_do(sizes, seed, queries):
    scores = scores_of(sizes, seed=seed)
    gone = ["z0", "z1"]
    wanted = scores.predict_removal(gone, renormalize=True).values
    for examples in (2, sum(sizes)):
        part = scores.corner(queries, examples)
        np.testing.assert_allclose(part.predict_removal(gone, renormalize=True).values, wanted[:queries], atol=1e-12)
        grouped = part.group({"gone": gone}).corner(queries, 1)
        np.testing.assert_allclose(
            grouped.predict_removal(["gone"], renormalize=True).values, wanted[:queries], atol=1e-12
        )
        for derived, subset in ((part, gone), (grouped, ["gone"])):
            weights = np.random.default_rng(seed).random(queries) + 0.1
            mean = sp.curate.aggregate(derived, weights=weights).to_scores()
            np.testing.assert_allclose(
                mean.predict_removal(subset, renormalize=True).values,
                np.average(wanted[:queries], weights=weights),
                atol=1e-12,
            )
    names = ["x", "y", "x"]
    means = sp.curate.aggregate(scores, groups=names).to_scores()
    assert (means.query_ids, means.stage_sizes) == (["x", "y"], tuple(sizes))
    np.testing.assert_allclose(
        means.predict_removal(gone, renormalize=True).values, [(wanted[0] + wanted[2]) / 2, wanted[1]], atol=1e-12
    )


def test_the_verbs_of_a_bank_of_stages_agree(staged, tmp_path):
    problem, bank = staged
    method = source(problem, bank)
    features = method.sketch(problem.queries)
    gone = [("pretrain", i) for i in range(20)] + [("finetune", 3)]
    places = [bank.ids.index(its_id) for its_id in gone]
    wanted = method.score(features).predict_removal(gone, renormalize=True).values
    streamed = method.score(features, out=tmp_path / "scores.zarr")
    derived = {
        "streamed": streamed,
        "corner": streamed.corner(6, 40),
        "parts": method.by_segment(features).total(),
        "some parts": method.by_segment(features, rows=places[::-1]).total(),
    }
    for name, scores in derived.items():
        change = scores.predict_removal(gone, renormalize=True)
        np.testing.assert_allclose(change.values, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max(), err_msg=name)
        assert change.n_removed == 21
    for verb in (streamed, derived["some parts"]):
        mean = sp.curate.aggregate(verb).to_scores().predict_removal(gone, renormalize=True)
        np.testing.assert_allclose(mean.values, [wanted.mean()], rtol=1e-3)
    mean = sp.curate.aggregate(method, features).to_scores()
    np.testing.assert_allclose(mean.predict_removal(gone, renormalize=True).values, [wanted.mean()], rtol=1e-3)
    whole = [its_id for its_id in bank.ids if its_id[0] == "finetune"]
    for scores in (mean, derived["parts"], streamed.group({"fine": whole})):
        with pytest.raises(ValueError, match="all 15 examples of a stage are removed"):
            scores.predict_removal(["fine"] if scores.train_ids == ["fine"] else whole, renormalize=True)


def test_groups_that_share_examples_are_not_removed_together():
    scores = scores_of([6])
    grouped = scores.group({"a": ["z0", "z1"], "b": ["z1", "z2"]})
    assert grouped.predict_removal(["b"], renormalize=True).n_removed == 2
    for verb in (grouped.predict_removal, grouped.group):
        with pytest.raises(ValueError, match=r"share examples \(1 would count twice\)"):
            verb(["a", "b"])


def test_what_is_sent_to_another_process_predicts_there_or_says_why_not():
    scores = scores_of([4, 3])
    wanted = scores.predict_removal(["z1"], renormalize=True).values
    whole, grouped, part = (
        pickle.loads(pickle.dumps(each)) for each in (scores, scores.group({"a": ["z1"]}), scores.corner(3, 2))
    )
    np.testing.assert_array_equal(whole.predict_removal(["z1"], renormalize=True).values, wanted)
    np.testing.assert_allclose(grouped.predict_removal(["a"], renormalize=True).values, wanted, atol=1e-12)
    np.testing.assert_allclose(part.predict_removal(["z1"]).values, scores.predict_removal(["z1"]).values)
    with pytest.raises(ValueError, match="came from another process"):
        part.predict_removal(["z1"], renormalize=True)


def test_stages_must_make_up_the_training_examples():
    with pytest.raises(ValueError, match=r"stages of sizes \[4\] do not make 10 training examples"):
        Scores(np.ones((1, 10)), ["q"], range(10), unit="u", stage_sizes=[4])


def test_similarities_stay_similarities():
    """Means of cosines were summed over examples, and called changes that including them had made."""
    values = np.random.default_rng(0).uniform(-1, 1, (4, 8))
    cosines = Scores(values, range(4), range(8), unit="cosine", additive=False)
    aggregated = sp.curate.aggregate(cosines)
    derived = [cosines.corner(2, 3), aggregated.to_scores()]
    for scores in derived:
        assert "similarity (cosine)" in repr(scores)
        for verb in (scores.group, scores.predict_removal):
            with pytest.raises(ValueError, match="are a similarity"):
                verb([0])
    cleanings = [sp.curate.drop_worst(aggregated, 2), sp.curate.select(cosines, n=2), sp.curate.harmful(aggregated)]
    reasons = [reason for cleaning in cleanings for reason in cleaning.reasons]
    assert all("including" not in reason and "its mean cosine with 4 queries is" in reason for reason in reasons)
    changes = sp.curate.aggregate(Scores(values, range(4), range(8), unit="nats"))
    assert "including it changed the mean nats of 4 queries by" in sp.curate.drop_worst(changes, 1).reasons[0]


def test_groups_are_said_to_be_groups():
    scores = scores_of([2, 3])
    grouped = scores.group({"a": ["z0"], "b": ["z1", "z2"]})
    assert repr(scores).startswith("Scores(3 queries x 5 training examples; ")
    assert repr(grouped).startswith("Scores(3 queries x 2 groups of training examples; ")
    assert repr(grouped.group(["a"])).startswith("Scores(3 queries x 1 group of training examples; ")
    assert repr(scores.population) == "Population(5 training examples; stages of 2, 3)"
    assert repr(grouped.population) == "Population(2 groups of training examples; stages of 2, 3)"
