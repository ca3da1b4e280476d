"""The strongest examples are the same ones, whoever looks for them: of equal scores those that come first."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from problems import classification, source
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.attribution.ranking import strongest
from source_proj.kernels.scoring import Strongest

KINDS = [np.bool_, np.int8, np.uint8, np.int64, np.uint64, np.float16, np.float32, np.float64]


def few_values(kind):
    """Values of which many are equal, the ends of the type's range among them."""
    if np.dtype(kind).kind == "b":
        return st.booleans()
    if np.dtype(kind).kind == "f":
        return st.sampled_from([-np.inf, -1.5, 0.0, 2.0, np.inf])
    return st.sampled_from([int(np.iinfo(kind).min), 0, 1, int(np.iinfo(kind).max)])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), highest=st.booleans())
@pytest.mark.parametrize("kind", KINDS)
def test_the_strongest_are_those_of_a_full_stable_sort(kind, data, highest):
    """-values wraps around for the smallest and for unsigned integers; a partition takes any of equal scores."""
    shape = data.draw(array_shapes(min_dims=2, max_dims=2, max_side=40))
    values = data.draw(arrays(kind, shape, elements=few_values(kind)))
    k = data.draw(st.integers(1, shape[1]))
    plain = values.tolist()
    wanted = [sorted(range(shape[1]), key=lambda place: -row[place] if highest else row[place]) for row in plain]
    indices, scores = strongest(values, k, highest=highest)
    assert indices.tolist() == [row[:k] for row in wanted]
    np.testing.assert_array_equal(scores, np.take_along_axis(values, indices, 1))
    scored = sp.Scores(values, range(shape[0]), range(shape[1]), unit="u")
    hits = scored.top_k(k) if highest else scored.bottom_k(k)
    np.testing.assert_array_equal(hits.indices, indices)
    every = scored.top_k(shape[1])
    np.testing.assert_array_equal((every.helpful(k) if highest else every.harmful(k)).indices, indices)
    if kind == np.float32:
        best = Strongest(shape[0], k, largest=highest)
        best.add_scores(torch.from_numpy(values), first=0)
        np.testing.assert_array_equal(best.result()[1].numpy(), indices)


def test_scores_that_are_no_numbers_come_last():
    values = np.array([[np.nan, 1.0, np.nan, 1.0, -np.inf]])
    for k in range(1, 6):
        assert strongest(values, k, highest=True)[0].tolist() == [[1, 3, 4, 0, 2][:k]]
        assert strongest(values, k, highest=False)[0].tolist() == [[4, 1, 3, 0, 2][:k]]


@settings(max_examples=5, deadline=None)
@given(k=st.integers(1, 20), seed=st.integers(0, 9))
def test_scores_and_their_method_list_the_same(tmp_path_factory, k, seed):
    """A training set in which every example stands twice: which of the two was listed was left to chance."""
    problem = classification(10, checkpoints=2, seed=seed)
    problem.train = TensorDataset(*(torch.cat([tensor, tensor]) for tensor in problem.train.tensors))
    method = source(problem, problem.build(tmp_path_factory.mktemp("twice") / "bank", batch_size=10))
    features = method.sketch(problem.queries)
    scores = method.score(features)
    for verb in ("top_k", "bottom_k", "helpful", "harmful"):
        streamed, held = getattr(method, verb)(features, k), getattr(scores, verb)(k)
        same = (streamed.scores == held.scores).all(1)  # to the bit
        assert same.any()
        np.testing.assert_array_equal(streamed.indices[same], held.indices[same])
