"""Labels, targets and tokens that a model can't have: the error names the value, its place and the remedy."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp

N, T, WORDS, CLASSES = 8, 5, 7, 3


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)

    def forward(self, input_ids):
        return self.head(self.words(input_ids))


def texts(tokens, labels):
    return [{"input_ids": row, "labels": its} for row, its in zip(tokens, labels, strict=True)]


def replaced(values, place, value):
    values = values.clone()
    values[place] = value
    return values


def language(what, place=(5, 2)):
    """Eight sequences of which one has a token, or a label, that the model has not."""
    tokens = torch.randint(WORDS, (N, T))
    return {
        "label": lambda value: texts(tokens, replaced(tokens, place, value)),
        "token": lambda value: texts(replaced(tokens, place, value), tokens),
    }[what]


def refused(tmp_path, model, task, good, bad, error, message):
    """By a build, and as queries."""
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    options = {"sketch": sp.Sketch(16), "progress": False, "batch_size": 4}
    with pytest.raises(error, match=message):
        sp.build(model, task, trajectory, bad, tmp_path / "bad", **options)
    bank = sp.build(model, task, trajectory, good, tmp_path / "good", **options)
    with pytest.raises(error, match=message):
        sp.Source(bank, model=model, progress=False).score(bad)


@pytest.mark.parametrize("value", [WORDS, 10**6, -1, -3])
@pytest.mark.parametrize("what", ["label", "token"])
def test_tokens_that_the_model_has_not_are_named(tmp_path, what, value):
    message = {
        "label": rf"the labels \[{value}\] of ids \[5\], at the positions \[2\], are none of .*7 tokens.*-100",
        "token": rf"embedding 'words' has 7 rows.* ids \[5\] ask for \[{value}\], at the positions \[2\].*tokenizer",
    }[what]
    refused(tmp_path, Words(), sp.CausalLM(), language("label")(0), language(what)(value), sp.MismatchError, message)


@pytest.mark.parametrize("what", ["label", "token"])
def test_the_first_example_is_looked_at_like_the_others(tmp_path, what):
    message = r"(examples|ids) \[0\].*at the positions \[2\]"
    bad = language(what, (0, 2))(9)
    refused(tmp_path, Words(), sp.CausalLM(), language("label")(0), bad, sp.SourceProjError, message)


def test_tokens_and_labels_are_integers(tmp_path):
    tokens = torch.randint(WORDS, (N, T))
    good = texts(tokens, tokens)
    for bad, message in (
        (texts(tokens, tokens.float()), r"labels must be integer .*float32: give labels.long\(\)"),
        (texts(tokens.float(), tokens), r"embedding 'words' was given torch.float32.*input_ids.long\(\)"),
    ):
        refused(tmp_path / message[:6], Words(), sp.CausalLM(), good, bad, TypeError, message)


def test_sequences_of_which_no_label_counts_are_warned_of(tmp_path):
    tokens = torch.randint(WORDS, (N, T))
    model = Words()
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    options = {"sketch": sp.Sketch(16), "progress": False}
    with pytest.warns(UserWarning, match="no label of the first 4 examples counts, all are -100"):
        sp.build(model, sp.CausalLM(), trajectory, texts(tokens, tokens * 0 - 100), tmp_path, **options)


INPUTS, LABELS = torch.randn(N, 4), torch.arange(N) % CLASSES
CLASS_CASES = {
    "too large": (
        replaced(LABELS, 5, 3),
        sp.MismatchError,
        r"labels of ids \[5\] are \[3\], and the model has 3 classes",
    ),
    "negative": (replaced(LABELS, 5, -2), sp.MismatchError, r"labels of ids \[5\] are \[-2\]"),
    "float": (LABELS.float(), TypeError, r"float32: give labels.long\(\)"),
    "one-hot": (nn.functional.one_hot(LABELS, CLASSES), ValueError, r"labels.argmax\(-1\) of one-hot rows"),
    "probabilities": (
        nn.functional.one_hot(LABELS, CLASSES).float(),
        ValueError,
        r"labels.argmax\(-1\) of one-hot rows",
    ),
    "a column": (LABELS[:, None], ValueError, r"labels.squeeze\(1\)"),
}


@pytest.mark.parametrize("case", CLASS_CASES)
def test_labels_that_are_no_classes_are_refused(tmp_path, case):
    labels, error, message = CLASS_CASES[case]
    good, bad = TensorDataset(INPUTS, LABELS), TensorDataset(INPUTS, labels)
    refused(tmp_path, nn.Linear(4, CLASSES), sp.Classification(), good, bad, error, message)


@pytest.mark.parametrize("options", [{}, {"reduction": "token"}, {"reduction": "token", "normalizer": "labels"}])
def test_a_classifiers_labels_are_no_language_models(tmp_path, options):
    model = nn.Linear(4, CLASSES)
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    message = (
        r"labels \(batch, tokens\), and logits .*, got labels \(8,\); for one answer an example, take Classification"
    )
    with pytest.raises(ValueError, match=message):
        sp.build(model, sp.CausalLM(**options), trajectory, TensorDataset(INPUTS, LABELS), tmp_path / "bank")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (
            nn.Linear(4, CLASSES),
            TensorDataset(INPUTS.double(), LABELS),
            r"^the input is float64, and the model float32: ",
        ),
        (
            Named(),
            [{"x": row.double(), "labels": 0} for row in INPUTS],
            r"^'x' is float64, .*as float32, by \.float\(\)",
        ),
        (Named(), [{"x": row, "y": row, "labels": 0} for row in INPUTS], "^the model takes no argument 'y': leave the"),
        (
            Named(),
            [{"image": row, "labels": 0} for row in INPUTS],
            "^the model takes no argument 'image': call the column 'image' 'x', as its forward does, or give tuples",
        ),
        (
            Named(),
            [{"image": row, "y": row, "labels": 0} for row in INPUTS],
            "^the model takes no argument 'image': leave the column .* or out of the data set; the model needs 'x'",
        ),
    ],
)
def test_inputs_of_another_type_are_named(tmp_path, model, data, message):
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    with pytest.raises(TypeError, match=message):
        sp.build(model, sp.Classification(), trajectory, data, tmp_path / "bank")


@pytest.mark.parametrize("texts", [["why?"], ["why?", "who?"], ["why?", "who?", "when?"]])
@pytest.mark.parametrize("kind", ["classification", "language"])
def test_texts_that_nothing_has_tokenised_are_refused_as_queries(tmp_path, texts, kind):
    language_model = kind == "language"
    model = Words() if language_model else nn.Linear(4, CLASSES)
    task = sp.CausalLM() if language_model else sp.Classification()
    data = language("label")(0) if language_model else TensorDataset(INPUTS, LABELS)
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    bank = sp.build(model, task, trajectory, data, tmp_path / "bank", sketch=sp.Sketch(16), progress=False)
    with pytest.raises((TypeError, ValueError), match=r"text.*: tokenise as in training, tokenizer\(texts, padding"):
        sp.Source(bank, model=model, progress=False).helpful(texts, k=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("measurement", ["absolute", "squared"])
def test_targets_that_are_not_finite_are_named(tmp_path, measurement, value):
    good, bad = (TensorDataset(INPUTS, targets) for targets in (INPUTS[:, :1], replaced(INPUTS[:, :1], 5, value)))
    message = rf"the targets of ids \[5\] are \[{value}\], and must be finite"
    refused(tmp_path, nn.Linear(4, 1), sp.Regression(measurement), good, bad, sp.MismatchError, message)


@pytest.mark.parametrize(("outputs", "targets"), [(1, 2), (2, 1), (2, 2)])
def test_targets_are_never_spread_over_predictions(tmp_path, outputs, targets):
    model, bad = nn.Linear(4, outputs), TensorDataset(INPUTS, INPUTS[:, :targets])
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    with pytest.raises(ValueError, match="one number an example"):
        sp.build(model, sp.Regression(), trajectory, bad, tmp_path, sketch=sp.Sketch(16), progress=False)


@pytest.mark.parametrize("label", [-100, CLASSES, 10**6])
def test_labels_that_have_no_class_weight_are_named(tmp_path, label):
    model = nn.Linear(4, CLASSES)
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    labels = replaced(torch.arange(N) % CLASSES, 5, label)
    task = sp.Classification(class_weights=[1.0, 2.0, 3.0])
    with pytest.raises(sp.MismatchError, match=rf"the labels of ids \[5\] are \[{label}\]"):
        sp.build(
            model, task, run, TensorDataset(torch.randn(N, 4), labels), tmp_path / "b", progress=False, batch_size=4
        )
    one_hot = TensorDataset(torch.randn(N, 4), nn.functional.one_hot(torch.arange(N) % CLASSES))
    with pytest.raises(ValueError, match=r"one class an example.*labels.argmax.*CausalLM\(shift=False\) has no class"):
        sp.build(model, task, run, one_hot, tmp_path / "c", progress=False)


def test_rows_of_python_lists_are_no_tokens(tmp_path):
    model = Words()
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    with pytest.raises((ValueError, TypeError), match=r"torch.tensor\("):
        sp.build(model, sp.CausalLM(), run, rows, tmp_path / "b", progress=False)


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("task", [sp.Classification(), sp.Regression()], ids=["classes", "numbers"])
def test_labels_that_are_texts_are_named(tmp_path, task, as_dict):
    def rows(labels):
        return [
            {"input": x, "labels": its} if as_dict else (x, its)
            for x, its in zip(torch.randn(N, 4), labels, strict=True)
        ]

    numbers = [i % 3 if task.name == "classification" else float(i) for i in range(N)]
    model = nn.Linear(4, 3 if task.name == "classification" else 1)
    message = "labels of a batch must be a tensor of numbers, got a .*: give each class a number"
    refused(tmp_path, model, task, rows(numbers), rows(["cat", "dog"] * (N // 2)), TypeError, message)


def test_several_inputs_are_given_by_name(tmp_path):
    model = nn.Bilinear(4, 4, 3)
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    data = TensorDataset(torch.randn(N, 4), torch.randn(N, 4), torch.arange(N) % 3)
    with pytest.raises(ValueError, match="got a list of 3: give several inputs as a dict, by the names of the model's"):
        sp.build(model, sp.Classification(), run, data, tmp_path / "bank", sketch=sp.Sketch(16), progress=False)


@pytest.mark.parametrize("knows", [True, False])
def test_tags_are_no_next_tokens(knows):
    """A model that knows each token's tag, of which there are few; one that knows nothing is no sign."""
    torch.manual_seed(0)
    tokens = torch.randint(6, (8, 12))
    batch, table = {"input_ids": tokens, "labels": tokens % 3}, torch.zeros(6, 3)
    table[torch.arange(6), torch.arange(6) % 3] = 1.5 if knows else 0.0
    model = lambda input_ids: table[input_ids]  # noqa: E731
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sp.CausalLM(shift=True).examine(model, batch)
    assert any("own tokens (tags)" in str(each.message) for each in caught) is knows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sp.CausalLM(shift=False).examine(model, batch)
