"""Questions without labels are about what the model itself says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from source_proj._errors import MismatchError
from source_proj.task import Answers, CausalLM, Classification, Regression, Task


def batches(inputs):
    """A batch without labels, in each of its forms."""
    return [inputs, [inputs], (inputs,), {"input": inputs}]


class Named(nn.Linear):
    def forward(self, input):
        return super().forward(input)


@settings(max_examples=25)
@given(seed=st.integers(0, 99), classes=st.integers(2, 5))
def test_the_predicted_class_is_asked_about_where_there_is_no_label(seed, classes):
    torch.manual_seed(seed)
    model, inputs = Named(3, classes), torch.randn(4, 3)
    predicted = model(inputs).argmax(1)
    expected = Classification().measurement(model, (inputs, predicted))
    for batch in batches(inputs):
        assert torch.equal(Classification().measurement(model, batch), expected)
    labelled = (inputs, torch.zeros(4, dtype=torch.long))
    assert torch.equal(Classification(target="predicted").measurement(model, labelled), expected)
    answers = Classification().answers(model, [inputs])
    assert torch.equal(answers.values, predicted)
    torch.testing.assert_close(answers.probabilities, model(inputs).softmax(1).max(1).values)
    chosen = Classification(target=1)
    ones = torch.ones(4, dtype=torch.long)
    assert torch.equal(chosen.measurement(model, labelled), Classification().measurement(model, (inputs, ones)))
    # What is trained on stays the label.
    assert torch.equal(chosen.output(model, labelled), Classification().output(model, labelled))


def test_the_target_is_no_part_of_a_bank():
    for target in ("predicted", 2):
        task = Classification(label_smoothing=0.1, target=target)
        assert task.spec() == Classification(label_smoothing=0.1).spec()
        assert Task.from_spec({**task.spec(), "target": target}).target == target
        assert task.by_target().target == "label"


@pytest.mark.parametrize("target", ["labels", -1, True, 1.5, None])
def test_no_target_is_refused(target):
    with pytest.raises(ValueError, match=r"'label', 'predicted' or a class index"):
        Classification(target=target)


def test_a_class_that_the_model_has_not_is_refused():
    with pytest.raises(ValueError, match="target=7 is none of the model's 3 classes"):
        Classification(target=7).answers(nn.Linear(2, 3), [torch.zeros(1, 2)])
    with pytest.raises(NotImplementedError, match="give queries with their targets"):
        Regression().answers(nn.Linear(2, 1), [torch.zeros(1, 2)])


class Chain(nn.Module):
    """A language model whose logits depend on the last two tokens alone, so that padding would change them."""

    def __init__(self, vocabulary=7):
        super().__init__()
        self.first = nn.Embedding(vocabulary, vocabulary)
        self.second = nn.Embedding(vocabulary, vocabulary)

    def forward(self, input_ids, attention_mask=None):
        before = nn.functional.pad(input_ids[:, :-1], (1, 0))
        return self.first(input_ids) + self.second(before)


@settings(max_examples=25)
@given(seed=st.integers(0, 99), data=st.data(), shift=st.booleans())
def test_continuations_are_the_likeliest_tokens_after_each_prompt(seed, data, shift):
    torch.manual_seed(seed)
    model, count = Chain(), 3
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    prompts = [torch.randint(7, (length,)) for length in lengths]
    tokens = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=6)
    mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    task = CausalLM(reduction="sum", shift=shift, max_new_tokens=count)
    batch = {"input_ids": tokens, "attention_mask": mask.long()}
    assert task.asks_for_answers(batch)
    answers = task.answers(model, batch)
    measured = task.measurement(model, task.answered(batch, answers.values)).detach()
    for i, prompt in enumerate(prompts):
        whole, total = prompt, 0.0
        for _ in range(count):  # naive: one token at a time, without batch or padding
            logp = model(whole[None])[0, -1].detach().log_softmax(0)
            total += float(logp.max())
            whole = torch.cat([whole, logp.argmax()[None]])
        assert answers[i].value == whole[len(prompt) :].tolist()
        assert answers[i].probability == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-4)
        assert float(measured[i]) == pytest.approx(total, rel=1e-4, abs=1e-5)


class Positions(nn.Module):
    """A language model of six learned positions."""

    def __init__(self):
        super().__init__()
        self.words, self.positions, self.head = nn.Embedding(7, 4), nn.Embedding(6, 4), nn.Linear(4, 7)

    def forward(self, input_ids):
        return self.head(self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1])))


@pytest.mark.parametrize("length", [2, 6])
def test_more_tokens_than_a_model_takes_are_refused_with_the_remedies(length):
    prompt = torch.zeros(1, length, dtype=torch.long)
    with pytest.raises(MismatchError, match=rf"takes 6 tokens .* query of {length} .*max_new_tokens=.*tokens, tokens"):
        CausalLM().answers(Positions(), prompt)
    if length == 2:
        assert len(CausalLM(max_new_tokens=4).answers(Positions(), prompt)[0].value) == 4


def test_a_single_input_is_no_batch_of_queries():
    with pytest.raises(ValueError, match=r"shape \(3,\).*input\[None\]"):
        Classification().answers(nn.Linear(4, 3), torch.zeros(4))


def test_entries_that_would_be_lost_are_refused():
    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.long), "position_ids": torch.zeros(1, 3)}
    with pytest.raises(ValueError, match="position_ids"):
        CausalLM().answers(Chain(), batch)
    with pytest.raises(ValueError, match="max_new_tokens counts tokens"):
        CausalLM(max_new_tokens=0)


def test_answers_of_batches_join_in_order():
    parts = [
        Answers(torch.tensor([[1, 2, 3]]), torch.tensor([0.5])),
        Answers(torch.tensor([[4, -100]]), torch.tensor([0.25])),
    ]
    joined = Answers.joined(parts)
    assert [joined[i].value for i in range(2)] == [[1, 2, 3], [4]]
    assert joined.at([1])[0].probability == 0.25
