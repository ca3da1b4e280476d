"""Each verb beside a naive twin of its own formula."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

import source_proj as sp
from source_proj import curate
from source_proj.curate import aggregates
from source_proj.curate.aggregates import aggregate
from source_proj.curate.mislabelled import _improbable

SEEDS = st.integers(0, 1 << 20)


def random_scores(seed, queries=6, n=9, higher_is_better=True):
    values = np.random.default_rng(seed).normal(size=(queries, n)).astype(np.float32)
    return sp.Scores(values, range(queries), [f"z{i}" for i in range(n)], unit="u", higher_is_better=higher_is_better)


@given(SEEDS, st.booleans(), st.booleans(), st.booleans())
def test_an_aggregate_is_mean_error_and_share(seed, weighted, grouped, higher_is_better):
    scores = random_scores(seed, higher_is_better=higher_is_better)
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 2, 6) if weighted else np.ones(6)
    groups = ["b", "a", "b", "a", "a", "b"] if grouped else ["all"] * 6
    summed = aggregate(scores, weights=weights if weighted else None, groups=groups if grouped else None)
    assert summed.groups == sorted(set(groups))
    for place, group in enumerate(summed.groups):
        own = np.array(groups) == group
        w, s = weights[own] / weights[own].sum(), scores.values[own].astype(np.float64)
        mean = w @ s
        assert np.allclose(summed.mean[place], mean)
        assert np.allclose(summed.error[place], np.sqrt(w @ w / (1 - w @ w) * (w @ (s - mean) ** 2)))
        assert np.allclose(summed.worsened[place], (s < 0 if higher_is_better else s > 0).mean(0))
        assert np.allclose(summed.benefit[place], mean if higher_is_better else -mean)
        if not weighted:
            assert np.allclose(summed.error[place], scipy.stats.sem(s))
    assert np.array_equal(summed.to_scores().values, summed.mean)


@given(SEEDS, st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_a_query_of_weight_0_counts_as_if_it_were_not_there(seed, weights):
    weight, scores = np.array(weights), random_scores(seed)
    there = weight > 0
    assume(there.sum() > 1)
    rest = sp.Scores(scores.values[there], np.flatnonzero(there), scores.train_ids, unit="u")
    summed, without = aggregate(scores, weights=weight), aggregate(rest, weights=weight[there])
    for name in ("sizes", "mean", "error", "worsened"):
        np.testing.assert_allclose(getattr(summed, name), getattr(without, name), rtol=1e-6, atol=1e-9)


def test_one_query_of_weight_is_as_little_proof_of_harm_as_one_query():
    with pytest.raises(ValueError, match="has one query"):
        curate.harmful(aggregate(random_scores(0), weights=[0, 0, 1, 0, 0, 0]))


@pytest.mark.parametrize("verb", [aggregate, lambda scored, *asked: curate.select(scored, *asked, n=2)])
def test_no_queries_are_refused(run, verb):
    nothing = run.source.sketch(run.queries).only([])
    with pytest.raises(ValueError, match="scores of 0 queries"):
        verb(run.source, nothing)
    with pytest.raises(ValueError, match="scores of 0 queries"):
        verb(run.source.score(nothing))


@pytest.mark.parametrize("block", [1, 44 * 3, 1 << 20])
def test_blocks_of_queries_change_nothing(run, block, monkeypatch):
    monkeypatch.setattr(aggregates, "_BLOCK_SCORES", block)
    groups = run.queries.tensors[1]
    asked = aggregate(run.source, run.queries, groups=groups)
    scored = aggregate(run.source.score(run.queries), groups=groups)
    assert asked.groups == scored.groups == [0, 1, 2]
    assert np.allclose(asked.mean, scored.mean, rtol=1e-5, atol=1e-7)
    assert np.allclose(asked.error, scored.error, rtol=1e-4, atol=1e-7)
    frame = asked.to_pandas()
    assert frame["mean"].tolist() == asked.mean.ravel().tolist()
    assert frame["group"].tolist()[43:45] == [0, 1]


def test_what_aggregates_cannot_take_is_refused(run):
    scores = random_scores(0)
    with pytest.raises(TypeError, match="leave queries out"):
        aggregate(scores, run.queries)
    with pytest.raises(TypeError, match="needs queries"):
        aggregate(run.source)
    with pytest.raises(TypeError, match="give an attribution method"):
        aggregate(np.zeros((2, 3)))
    with pytest.raises(sp.MismatchError, match="5 groups for 6 queries"):
        aggregate(scores, groups=range(5))
    with pytest.raises(sp.MismatchError, match=r"shape \(5,\) for 6 queries"):
        aggregate(scores, weights=range(5))
    for weight in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"got {float(weight)} for query 2"):
            aggregate(scores, weights=[1, 1, weight, 1, 1, 1])
    with pytest.raises(ValueError, match="group 'b' are all 0"):
        aggregate(scores, weights=[1, 1, 1, 0, 0, 0], groups="aaabbb")


@given(SEEDS, st.booleans())
def test_harmful_is_what_the_false_discovery_rate_lets_through(seed, higher_is_better):
    rng = np.random.default_rng(seed)
    values = rng.normal(rng.normal(size=12), 0.8, (8, 12))
    scores = sp.Scores(values, range(8), range(12), unit="u", higher_is_better=higher_is_better)
    named = curate.harmful(aggregate(scores), false_share=0.1)
    benefit = values.mean(0) * (1 if higher_is_better else -1)
    adjusted = scipy.stats.false_discovery_control(scipy.stats.t.cdf(benefit / scipy.stats.sem(values), 7))
    expected = np.flatnonzero(adjusted <= 0.1)
    assert named.ids == expected[np.argsort(benefit[expected])].tolist()
    assert len(named.reasons) == len(named)


def test_harmful_needs_a_spread_and_a_share():
    alone = aggregate(random_scores(0), groups="aaaaab")
    with pytest.raises(ValueError, match="group 'b' has one query"):
        curate.harmful(alone)
    with pytest.raises(ValueError, match="false_share must lie strictly"):
        curate.harmful(aggregate(random_scores(0)), false_share=1)
    for verb in (curate.harmful, lambda given: curate.drop_worst(given, 1)):
        with pytest.raises(TypeError, match=r"got a Scores: give source_proj\.curate\.aggregate\(source, queries\)"):
            verb(random_scores(0))


@given(SEEDS, st.integers(1, 8), st.booleans())
def test_the_worst_are_the_lowest_benefits(seed, n, by_class):
    scores = random_scores(seed, higher_is_better=bool(seed % 2))
    labels = np.array([0, 1, 0, 1, 0, 0, 1, 0, 0])
    dropped = curate.drop_worst(aggregate(scores), n, labels=labels if by_class else None)
    benefit = scores.values.astype(np.float64).mean(0) * (1 if seed % 2 else -1)
    assert len(dropped) == n
    assert np.all(np.diff(benefit[[int(name[1:]) for name in dropped.ids]]) >= 0)
    if not by_class:
        assert set(dropped.dropped) == set(np.argsort(benefit)[:n])
    for label, size in ((0, 6), (1, 3)):
        own = np.flatnonzero(labels == label)
        taken = [place for place in dropped.dropped if place in own]
        if by_class:
            assert abs(len(taken) - n * size / 9) < 1
        assert set(taken) == set(own[np.argsort(benefit[own])[: len(taken)]])


def herded(vectors, pool, quota, labels):
    """The definition, one norm at a time."""
    mean, chosen, total = vectors[:, pool].mean(1), [], np.zeros(len(vectors))
    quota = dict(quota)
    while any(quota[labels[z]] for z in pool if z not in chosen):
        free = [z for z in pool if z not in chosen and quota[labels[z]]]
        step = len(chosen) + 1
        best = min(free, key=lambda z: np.linalg.norm(step * mean - vectors[:, z] - total))
        chosen.append(best)
        quota[labels[best]] -= 1
        total = total + vectors[:, best]
    return chosen


@given(SEEDS, st.sampled_from([1.0, 2.0**-70, 2.0**60]), st.sampled_from([8.0, 4096.0]))
def test_a_selection_hangs_neither_on_the_unit_nor_on_what_all_examples_share(seed, unit, shared):
    """All of them help, and float32 holds each of these numbers exactly."""
    values = np.round(np.random.default_rng(seed).uniform(-4, 4, size=(3, 200)) * 2048) / 2048
    plain, moved = (
        curate.select(sp.Scores(given_values.astype(np.float32), range(3), range(200), unit="u"), n=60)
        for given_values in (values + 5, (values + shared) * unit)
    )
    assert moved.ids == plain.ids


@given(SEEDS, st.integers(1, 9), st.booleans())
def test_a_selection_is_herding_over_the_harmless(seed, n, by_class):
    scores = random_scores(seed)
    labels = [0, 1, 0, 1, 0, 0, 1, 0, 0] if by_class else [0] * 9
    selected = curate.select(scores, n=n, labels=labels if by_class else None)
    values = scores.values.astype(np.float64)
    benefit = values.mean(0)
    chance = scipy.stats.t.cdf(benefit / (values.std(0, ddof=1) / np.sqrt(6)), 5)
    harmful = np.flatnonzero(scipy.stats.false_discovery_control(chance) <= 0.05)
    pool = [z for z in range(9) if z not in harmful]
    counts = {
        label: sum(place in selected.kept and labels[place] == label for place in range(9)) for label in {*labels}
    }
    expected = herded(values, pool, counts, labels)
    assert [int(name[1:]) for name in selected.ids][: len(expected)] == expected
    assert len(selected) == len(selected.kept) == n
    rest = [int(name[1:]) for name in selected.ids][len(expected) :]
    assert set(rest) <= set(harmful.tolist())
    for label, count in counts.items():
        assert not by_class or abs(count - n * labels.count(label) / 9) < 1


def test_what_is_excluded_is_chosen_last(run):
    excluded = curate.mislabelled(run.source, run.labels, n=20)
    selected = curate.select(run.source, run.queries, n=24, exclude=excluded)
    assert not set(selected.kept) & set(excluded.dropped)
    assert len(curate.select(run.source, run.queries, n=44, exclude=excluded).kept) == 44
    with pytest.raises(sp.MismatchError, match="other training ids"):
        curate.select(random_scores(0), n=2, exclude=excluded)


def test_the_error_is_one_minus_the_probability(run):
    named = curate.mislabelled(run.source, run.labels, n=43)
    errors = []
    for checkpoint in range(3):
        run.bank.checkpoint(0, checkpoint).load_into(run.model)
        logits = run.model(run.train_set.tensors[0])
        errors.append(1 - logits.softmax(1)[torch.arange(44), run.labels].detach().numpy())
    expected = np.mean(errors, axis=0)
    assert np.allclose(named.values["error"], expected[named.ids], rtol=1e-4)
    assert np.allclose(named.values["error"], np.sort(expected)[::-1][:43], rtol=1e-4)
    likely = curate.mislabelled(run.source, run.labels)
    assert set(likely.dropped) == set(np.flatnonzero(_improbable(expected, run.labels.numpy())))


@given(st.integers(2, 12), st.floats(0.3, 0.9), st.floats(0, 0.25), st.integers(0, 2**16))
def test_wrong_labels_are_told_from_those_that_a_network_is_unsure_of(classes, sureness, wrong_share, seed):
    """Right labels have a probability about p, wrong ones what p leaves them: these are named, however low p is."""
    rng = np.random.default_rng(seed)
    member = rng.permutation(np.arange(60 * classes) % classes)
    wrong = rng.random(len(member)) < wrong_share
    p = 1 / classes + sureness * (1 - 1 / classes)  # of the right label, above chance
    probability = np.where(wrong, (1 - p) / (classes - 1), p) * (1 + 0.05 * rng.uniform(-1, 1, len(member)))
    assume(
        max(wrong[member == label].mean() for label in range(classes)) < 0.35
    )  # with more, right ones are the odd ones
    assert _improbable(1 - probability, member).tolist() == wrong.tolist()


@given(st.integers(0, 2**16))
def test_of_two_classes_the_less_probable_label_is_named(seed):
    rng = np.random.default_rng(seed)
    error, member = rng.random(40), np.arange(40) % 2
    assert _improbable(error, member).tolist() == (error > 0.5).tolist()


def test_disagreement_is_the_score_of_the_other_classes_losses(run):
    named = curate.mislabelled(run.source, run.labels, n=43, by="disagreement")
    (margins,) = run.source.sketch(run.train_set)  # by the query's own backward pass
    rows = {}
    for checkpoint in range(3):
        point = run.bank.checkpoint(0, checkpoint)
        point.load_into(run.model)
        probability = run.model(run.train_set.tensors[0]).softmax(1)[torch.arange(44), run.labels].detach()
        (key,) = [key for key in margins.rows if key.startswith(point.hash())]
        losses = (1 - probability)[:, None] * margins.rows[key]
        rows[key] = torch.stack([losses[run.labels == label].mean(0) for label in range(3)])
    scores = run.source.score(sp.QueryFeatures(rows, list(range(3)), margins.sketch)).values
    harm = np.where(np.arange(3)[:, None] == run.labels.numpy(), -np.inf, -scores)
    found = named.values["disagreement"]  # whose order leaves what rounding makes equal open
    assert np.allclose(found, np.sort(harm.max(0))[::-1][:43], rtol=1e-3, atol=1e-7)
    assert np.allclose(found, harm.max(0)[named.ids], rtol=1e-3, atol=1e-7)
    assert named.values["rival"].tolist() == harm.argmax(0)[named.ids].tolist()


def test_self_influence_orders_and_its_outliers_are_named(run):
    influence = np.asarray(run.source.self_influence(), dtype=np.float64)
    named = curate.mislabelled(run.source, run.labels, by="self_influence")
    outlying = []
    for label in range(3):
        own = np.flatnonzero(run.labels.numpy() == label)
        middle, spread = np.median(influence[own]), scipy.stats.median_abs_deviation(influence[own], scale="normal")
        outlying += own[influence[own] > middle + 3.5 * spread].tolist()
    assert named.ids == sorted(outlying, key=lambda place: -influence[place])
    assert all("rank 1 of" in reason for _, reason in named.first(1))


def test_labels_with_braces_are_words(run):
    names = np.array(["{0}", "{rank}", "}{"])[run.labels]
    for by in ("error", "self_influence", "disagreement"):
        assert "labelled {" in " ".join(curate.mislabelled(run.source, names, n=43, by=by).reasons)


def test_classes_are_called_by_their_names(run):
    bank = run.source.banks[0]
    before, data = bank.examples, [(torch.zeros(2), int(label)) for label in run.labels]
    try:
        bank.examples = sp.Examples(data, class_names=["ape", "bee", "cat"])
        for by in ("error", "disagreement"):
            named = curate.mislabelled(run.source, run.labels, n=9, by=by)
            for reason, place in zip(named.reasons, named.ids, strict=True):
                assert reason.startswith(f"labelled {['ape', 'bee', 'cat'][run.labels[place]]}, ")
        assert any(f"class {name} by" in reason for reason in named.reasons for name in ("ape", "bee", "cat"))
    finally:
        bank.examples = before


def test_mislabelled_refuses_what_it_cannot_use(run):
    with pytest.raises(sp.MismatchError, match="43 labels for 44"):
        curate.mislabelled(run.source, run.labels[:-1])
    with pytest.raises(ValueError, match="by must be one of"):
        curate.mislabelled(run.source, run.labels, by="loss")
    with pytest.raises(ValueError, match="all labels are 1"):
        curate.mislabelled(run.source, [1] * 44)
    for other in (run.bank, sp.TracIn(run.bank), None):
        for by in ("error", "self_influence", "disagreement"):
            with pytest.raises(TypeError, match=rf"SOURCE, got a {type(other).__name__}: give Source\(bank\)"):
                curate.mislabelled(other, run.labels, by=by)


def test_weights_and_preferences_may_be_tensors(run):
    weights, scores = torch.rand(6), random_scores(0)
    expected = aggregate(scores, weights=weights.numpy()).mean
    assert np.array_equal(aggregate(scores, weights=(weights * 1).requires_grad_()).mean, expected)
    prefer = torch.arange(44).bfloat16().requires_grad_()
    named = curate.near_duplicates(run.bank, threshold=0.9999, prefer=prefer)
    assert named.ids == curate.near_duplicates(run.bank, threshold=0.9999, prefer=range(44)).ids


@pytest.mark.parametrize("n", [0, -1, 45, True, 2.5, None])
def test_a_number_of_examples_that_cannot_be_is_refused_by_its_name(run, n):
    error = TypeError if n in (2.5, None) else ValueError
    with pytest.raises(error, match=rf"n must .* got {n}"):
        curate.select(run.source, run.queries, n=n)
    with pytest.raises(error, match=rf"n must .* got {n}"):
        curate.drop_worst(curate.aggregate(run.source, run.queries), n)
    if n is not None:
        with pytest.raises(error, match=rf"n must .* got {n}"):
            curate.mislabelled(run.source, run.labels, n=n)


def test_one_example_at_least_is_left(run):
    with pytest.raises(ValueError, match=r"n must lie in 1\.\.43 .* got 44"):
        curate.mislabelled(run.source, run.labels, n=44)
    with pytest.raises(ValueError, match=r"n must lie in 1\.\.43 .* got 44"):
        curate.drop_worst(curate.aggregate(run.source, run.queries), 44)


@pytest.mark.parametrize("threshold", [0.9999, 0.97, 0.6])
def test_near_duplicates_are_the_connected_cosines(run, threshold):
    named = curate.near_duplicates(run.bank, threshold=threshold)
    rows = [torch.cat([block.rows for block in run.bank.stages[0].iter_rows(c)]).double().numpy() for c in range(3)]
    units = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in rows]
    cosine = np.mean([part @ part.T for part in units], axis=0)
    np.fill_diagonal(cosine, -2)
    count, cluster = connected_components(cosine >= threshold)
    firsts = {int(np.flatnonzero(cluster == number)[0]) for number in range(count)}
    assert set(named.dropped) == set(range(44)) - firsts
    assert set(run.copies) <= set(named.dropped)
    assert np.allclose(named.values["cosine"], cosine[named.ids].max(1), atol=1e-5)
    assert np.all(np.diff(named.values["size"]) <= 0)
    if threshold == 0.9999:
        assert named.ids == [40, 41, 42]
        assert "of this cluster of 3, 3 is kept" in named.reasons[0]


def test_of_a_cluster_the_preferred_stays(run):
    prefer = np.zeros(44)
    prefer[41] = 1
    named = curate.near_duplicates(run.bank, threshold=0.9999, prefer=prefer)
    assert named.ids == [3, 40, 42]
    one = curate.near_duplicates(run.bank, threshold=0.9999, checkpoints=[-1])
    assert one.ids == [40, 41, 42]
    with pytest.raises(sp.MismatchError, match=r"shape \(3,\) for 44"):
        curate.near_duplicates(run.bank, prefer=[1, 2, 3])
    with pytest.raises(ValueError, match="checkpoints is empty"):
        curate.near_duplicates(run.bank, checkpoints=[])
    with pytest.raises(TypeError, match=r"got 0: give \[0\]"):
        curate.near_duplicates(run.bank, checkpoints=0)
    with pytest.raises(ValueError, match=r"threshold is a cosine in \(0, 1\]"):
        curate.near_duplicates(run.bank, threshold=1.5)
    with pytest.raises(TypeError, match="sought in a bank"):
        curate.near_duplicates(run.source)


@pytest.mark.parametrize("block", [7, 44])
def test_blocks_of_rows_change_nothing(run, block, monkeypatch):
    whole = curate.near_duplicates(run.bank, threshold=0.8)
    monkeypatch.setattr("source_proj.curate.duplicates._BLOCK", block)
    cut = curate.near_duplicates(run.bank, threshold=0.8)
    assert cut.ids == whole.ids
    assert np.allclose(cut.values["cosine"], whole.values["cosine"], atol=1e-6)
