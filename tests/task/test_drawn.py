"""Labels drawn from a prediction, and what is made once of it for labels and draws alike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, vmap

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


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_probabilities_of_a_vocabulary_are_made_once_for_labels_and_draws(half, mapped, monkeypatch):
    """They are as large as the logits: made anew for each draw they were most of a pass's memory.

    Logits in half precision are copied to float32 on the way, and under vmap those whose labels can't be looked at are.
    """
    made = []
    monkeypatch.setattr(
        language, "log_softmax", lambda *given, **how: made.append(1) or torch.log_softmax(*given, **how)
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11))
    parameters = dict(model.named_parameters())
    tokens = torch.randint(0, 11, (3, 6))
    task = sp.CausalLM()
    numbers = torch.rand(2, 3, 6)

    def asked(run):
        """A run's outputs (3, 3) on batches of one or of all, and their gradients."""

        def of(parameters, tokens, numbers):
            uniforms = [lambda n, own=own: own[:, :n] for own in numbers]
            own = lambda inputs: functional_call(model, parameters, (inputs,))  # noqa: E731
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return torch.stack(run(own, (tokens, tokens), uniforms))

        if not mapped:
            return of(parameters, tokens, numbers), torch.func.jacrev(of)(parameters, tokens, numbers)
        places = (None, 0, 1)
        given = parameters, tokens[:, None], numbers[:, :, None]
        return vmap(of, places, 1)(*given)[..., 0], vmap(torch.func.jacrev(of), places)(*given)

    def alone(model, batch, uniforms):
        return task.output(model, batch), *(task.sampled_output(model, batch, uniform) for uniform in uniforms)

    together = asked(task.output_and_samples)
    assert len(made) == 2  # with the values and with their gradients
    apart = asked(alone)
    assert len(made) == 8
    torch.testing.assert_close(together, apart)
