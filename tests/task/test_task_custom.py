"""Custom tasks, descriptions, and what is refused by name."""

import json

import pytest
import torch
from torch import nn

from source_proj.task import CausalLM, Classification, Regression, Task

INPUTS, TARGETS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4.0)


def huber_output(model, batch):
    return model(batch[0]).squeeze(-1)


def huber_derivatives(output, batch):
    error = output - batch[1]
    return error.clamp(-1, 1), (error.abs() <= 1).to(output)


def relative_error(model, batch):
    return huber_output(model, batch) / (1 + batch[1])


HUBER = {"output": huber_output, "loss_derivatives": huber_derivatives}


class Huber(Task):
    """The same by subclass."""

    name = "huber"
    unit = "prediction"

    def output(self, model, batch):
        return huber_output(model, batch)

    def loss_derivatives(self, output, batch):
        return huber_derivatives(output, batch)


class Bare(Task):
    """Without a constructor of the base class."""

    def __init__(self):
        pass

    def output(self, model, batch):
        return huber_output(model, batch)


@pytest.mark.parametrize("task", [Task(**HUBER), Huber()], ids=["functions", "subclass"])
def test_custom(task):
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 1), (INPUTS, TARGETS)
    output = task.output(model, batch)
    first, second = task.loss_derivatives(output.detach(), batch)
    expected = nn.functional.huber_loss(output, TARGETS, reduction="none")
    gradient = torch.autograd.grad(expected.sum(), output)[0]
    torch.testing.assert_close(first, gradient)
    assert second.shape == (4,)
    assert torch.equal(task.measurement(model, batch), output)
    with pytest.raises(NotImplementedError, match=r"no sampled_output: give sampled_output= to Task"):
        task.sampled_output(model, batch, lambda n: torch.zeros(4, n))


def test_measurement_and_sampled_output_by_function():
    task = Task(
        **HUBER,
        measurement=relative_error,
        sampled_output=lambda model, batch, uniform: uniform(1)[:, 0] * huber_output(model, batch),
        higher_is_better=False,
        unit="relative error",
        name="relative",
    )
    model, batch = nn.Linear(3, 1), (INPUTS, TARGETS)
    assert torch.equal(task.measurement(model, batch), relative_error(model, batch))
    sampled = task.sampled_output(model, batch, lambda n: torch.full((4, n), 2.0))
    assert torch.equal(sampled, 2 * huber_output(model, batch))
    assert (task.name, task.unit, task.higher_is_better) == ("relative", "relative error", False)


def test_defaults():
    assert (Task(**HUBER).name, Task(**HUBER).unit, Task(**HUBER).higher_is_better) == ("custom", "output", True)
    assert (Huber().name, Huber().unit) == ("huber", "prediction")
    bare = Bare()
    assert torch.equal(bare.measurement(nn.Identity(), (TARGETS, None)), TARGETS)
    with pytest.raises(NotImplementedError, match=r"'custom' has no loss_derivatives.*override it in Bare"):
        bare.loss_derivatives(TARGETS, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs output="),
        ({"output": 3}, "function, got 3"),
        ({"measurement": len}, "needs output"),
    ],
)
def test_bad_custom_arguments(arguments, message):
    with pytest.raises(TypeError, match=message):
        Task(**arguments)


@pytest.mark.parametrize("returned", [lambda m, b: m(b[0]), lambda m, b: m(b[0]).sum(), lambda m, b: 1.0])
def test_custom_outputs_are_one_number_an_example(returned):
    task = Task(returned, lambda output, batch: (output[:, None], None), measurement=returned)
    for call in (task.output, task.measurement):
        with pytest.raises(ValueError, match=r"one number per example, shape \(batch,\)"):
            call(nn.Linear(3, 1), (INPUTS, TARGETS))
    with pytest.raises(ValueError, match=r"ℓ' must be one number per example.*\(4, 1\)"):
        task.loss_derivatives(TARGETS, None)


BUILTIN = [
    Classification(),
    Classification(label_smoothing=0.1, sample_weight="trust"),
    Classification(sample_weight=2),
    Regression(),
    Regression(measurement="squared", loss="half_mse", sample_weight=2),
    CausalLM(),
    CausalLM(shift=False, reduction="sum", ignore_index=-1),
]


@pytest.mark.parametrize("task", BUILTIN, ids=repr)
def test_spec_round_trip(task):
    spec = json.loads(json.dumps(task.spec()))
    again = Task.from_spec(spec)
    assert type(again) is type(task)
    assert again.spec() == task.spec() == spec
    assert again.unit == task.unit


class Odd(Classification):
    """Named as the built-in one, but another."""

    def measurement(self, model, batch):
        return -super().measurement(model, batch)


def test_specs_tell_tasks_apart():
    specs = [task.spec() for task in [*BUILTIN, Odd(), Huber(), Bare(), Task(**HUBER), Task(huber_output)]]
    assert all(a != b for i, a in enumerate(specs) for b in specs[:i])


@pytest.mark.parametrize("task", [Task(**HUBER), Huber(), Odd()], ids=repr)
def test_custom_tasks_cannot_be_rebuilt(task):
    assert json.loads(json.dumps(task.spec())) == task.spec()
    with pytest.raises(ValueError, match="give the task object as task="):
        Task.from_spec(task.spec())


def test_unknown_spec():
    with pytest.raises(ValueError, match="'segmentation' is none of the built-in ones"):
        Task.from_spec({"name": "segmentation"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classification(label_smoothing=1.0), "label_smoothing.*1.0"),
        (lambda: Classification(label_smoothing=-0.1), "label_smoothing.*-0.1"),
        (lambda: Classification(label_smoothing="0.1"), "label_smoothing must be a number .*, got '0.1'"),
        (lambda: Classification(label_smoothing=None), "label_smoothing.*None"),
        (lambda: Classification(class_weights="12"), "class_weights must be numbers, one a class.*'12'"),
        (lambda: Classification(class_weights=3), "class_weights.*3"),
        (lambda: Classification(class_weights=[1, "a"]), "class_weights.*'a'"),
        (lambda: Classification(class_weights=[1, 2], normalizer="2"), "normalizer.*'2'"),
        (lambda: CausalLM(reduction="token", normalizer=["a"]), "normalizer.*'a'"),
        (lambda: CausalLM(shift="False"), "shift must be True or False, got 'False'"),
        (lambda: CausalLM(ignore_index="x"), "ignore_index is a label, an integer .*'x'"),
        (lambda: CausalLM(ignore_index=None), "ignore_index.*None"),
        (lambda: Classification(sample_weight=1), "sample_weight.*1"),
        (lambda: Regression(sample_weight=True), "sample_weight.*True"),
        (lambda: Regression(measurement="relative"), "'relative'"),
        (lambda: Regression(loss="huber"), "'huber'"),
        (lambda: CausalLM(reduction="none"), "'none'"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def identity(inputs=None, **others):
    return inputs


LOGITS, LABELS = torch.zeros(4, 5), torch.zeros(4, dtype=torch.long)
TOKENS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("task", "batch", "error", "message"),
    [
        (Classification(), (torch.zeros(4, 1), LABELS), ValueError, r"two classes or more, got \(4, 1\)"),
        (Classification(), (torch.zeros(4, 1), LABELS), ValueError, r"torch.cat\(\[torch.zeros_like\(z\), z\], 1\)$"),
        (Classification(), (torch.zeros(4), LABELS), ValueError, r"got \(4,\).* of z = logits\[:, None\]"),
        (Classification(), (torch.zeros(4, 5, 6), LABELS), ValueError, r"got \(4, 5, 6\); .*CausalLM\(shift=False\)"),
        (Classification(), (torch.zeros(4, 5, 6, 6), LABELS), ValueError, r"got \(4, 5, 6, 6\); write a Task"),
        (Classification(), (LOGITS, LABELS[:3]), ValueError, r"labels \(3,\).*logits \(4, 5\)"),
        (Classification(), (LOGITS, LABELS.float()), TypeError, "class indices, got torch.float32"),
        (Classification(), (LOGITS, LABELS.bool()), TypeError, "got torch.bool"),
        (Classification(), (LOGITS, LABELS, LABELS), ValueError, r"\(input, target\), got a tuple of 3"),
        (Classification(), (LOGITS,), ValueError, r"got a tuple of 1: the labels are missing, give TensorDataset\("),
        (Classification(), LOGITS, ValueError, "got a Tensor: the labels are missing"),
        (Classification(), {"inputs": LOGITS}, ValueError, r"no entry 'labels', only \['inputs'\]: call the entry"),
        (Classification(), {"x": LOGITS, "label": LABELS}, ValueError, r"'x'\]: rename 'label' to 'labels'"),
        (CausalLM(), {"input_ids": TOKENS}, ValueError, r"\['input_ids'\]: give .*DataCollatorForLanguageModeling\(to"),
        (Classification(), ("text", LABELS), TypeError, "must return a tensor.*got str"),
        (Classification(sample_weight=2), (LOGITS, LABELS), ValueError, r"\(input, target, weight\), got a tuple of 2"),
        (Classification(sample_weight="w"), (LOGITS, LABELS, LABELS), ValueError, "a dict with 'labels' and 'w'"),
        (Classification(sample_weight="w"), {"inputs": LOGITS, "labels": LABELS}, ValueError, "no entry 'w'"),
        (Classification(sample_weight=2), {"inputs": LOGITS, "labels": LABELS}, ValueError, "no entry 2"),
        (Regression(), (LOGITS, TARGETS), ValueError, r"predictions of shape .*got \(4, 5\)"),
        (Regression(), (TARGETS, LOGITS), ValueError, r"targets of shape .*got \(4, 5\)"),
        (Regression(), (TARGETS, TARGETS[:3]), ValueError, "4 predictions for 3 targets"),
        (CausalLM(), (LOGITS, TOKENS), ValueError, r"got \(4, 5\) and \(2, 3\); for one answer .* Classification"),
        (CausalLM(), (torch.zeros(2, 4, 7), TOKENS), ValueError, r"got \(2, 4, 7\) and \(2, 3\)"),
        (CausalLM(), (torch.zeros(2, 3, 7), TOKENS.float()), TypeError, "got torch.float32"),
        (CausalLM(), (torch.zeros(2, 1, 7), TOKENS[:, :1]), ValueError, r"two tokens or more, got labels \(2, 1\)"),
    ],
)
def test_wrong_batches_are_refused_by_name(task, batch, error, message):
    with pytest.raises(error, match=message):
        task.output(identity, batch)


@pytest.mark.parametrize("weights", [torch.ones(3), torch.ones(4, 1), 2.0])
def test_wrong_weights(weights):
    task = Classification(sample_weight=2)
    with pytest.raises(ValueError, match=r"sample weights must be a tensor of shape \(4,\)"):
        task.loss_derivatives(TARGETS, (LOGITS, LABELS, weights))


def encoder_decoder(kind):
    transformers = pytest.importorskip("transformers", reason="needs transformers: install source-proj[hf]")
    torch.manual_seed(0)
    if kind == "t5":
        config = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=9, **config)).eval()
    sides = {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("attention_heads", "ffn_dim")}
    config = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 8, **sides}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=9, **config)).eval()


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_and_a_decoder_need_the_decoders_inputs(kind):
    model = encoder_decoder(kind)
    batch = {"input_ids": torch.randint(3, 9, (2, 5)), "labels": torch.randint(3, 9, (2, 5))}
    for task in (CausalLM(shift=False), CausalLM(shift=False, chunk=2)):
        for call in (task.output, task.measurement, task.examine, lambda *a, t=task: t.sampled_output(*a, None)):
            with pytest.raises(ValueError, match=r"ForConditionalGeneration has an encoder.*'decoder_input_ids'"):
                call(model, batch)
    given = {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
    own = -model(**batch).loss
    torch.testing.assert_close(CausalLM(shift=False).output(model, given).mean(), own)
