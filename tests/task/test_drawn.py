"""Labels drawn from a prediction, and what is made once of it for labels and draws alike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import source_proj as sp
from source_proj.task import batch as batches
from source_proj.task import language
from source_proj.task.batch import draw


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.integers(2, 6), st.integers(1, 40))
def test_draws_by_parts_are_those_of_a_search(seed, examples, steps, classes, at_once):
    generator = torch.Generator().manual_seed(seed)
    logp = torch.randn(examples, steps, classes, generator=generator).log_softmax(-1)
    uniform = torch.rand(examples, steps, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "_DRAWN_AT_ONCE", at_once)
        drawn = draw(logp, uniform)
    cumulative = logp.exp().cumsum(-1)
    wanted = torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)[..., 0]
    assert torch.equal(drawn, wanted.clamp(max=classes - 1))
    for part in (drawn[0, 0], draw(logp[0, 0], uniform[0, 0])):
        assert torch.equal(part, drawn[0, 0])


def test_the_probabilities_of_a_vocabulary_are_made_once_for_labels_and_draws(monkeypatch):
    """They are as large as the logits: made anew for each draw they were most of a pass's memory."""
    made = []
    monkeypatch.setattr(
        language, "log_softmax", lambda *given, **how: made.append(1) or torch.log_softmax(*given, **how)
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11))
    tokens = torch.randint(0, 11, (3, 6))
    task = sp.CausalLM()
    numbers = [torch.rand(3, 6) for _ in range(2)]
    uniforms = [lambda n, own=own: own[:, :n] for own in numbers]
    together = task.output_and_samples(model, (tokens, tokens), uniforms)
    assert len(made) == 1
    alone = task.output(model, (tokens, tokens)), *(task.sampled_output(model, (tokens, tokens), u) for u in uniforms)
    assert len(made) == 4
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours, theirs)
        gradients = [torch.autograd.grad(out.sum(), model[0].weight, retain_graph=True)[0] for out in (ours, theirs)]
        torch.testing.assert_close(*gradients)
