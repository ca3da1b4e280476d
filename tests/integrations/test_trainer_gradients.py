"""The Trainer's own gradient of its first update is the weighted sum of rows: padded, packed, accumulated, resumed."""

import pytest
import torch
from trainer_runs import StopAt, edit_state, transformers

import source_proj as sp
from source_proj.integrations import task_for
from source_proj.integrations.trainer_arguments import trainer_arguments

BATCH, EXAMPLES, LENGTH = 4, 24, 11
SHARED = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def language_model(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        small = {"n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
        config = transformers.GPT2Config(
            **small, **SHARED, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager"
        )
        return transformers.GPT2LMHeadModel(config)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **SHARED, max_position_embeddings=64))


def sequences(seed=1):
    """Tokens of 3 to 11."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, LENGTH + 1, (EXAMPLES,), generator=generator).tolist()
    return [torch.randint(3, 30, (length,), generator=generator) for length in lengths]


def padded(tokens, side="right", prompt=0):
    """A sequence as a padded row whose padding and prompt do not count."""
    rest = LENGTH - len(tokens)
    labels = tokens.clone()
    labels[:prompt] = -100
    ends = (0, rest) if side == "right" else (rest, 0)
    pad = torch.nn.functional.pad
    return {
        "input_ids": pad(tokens, ends),
        "attention_mask": pad(torch.ones_like(tokens), ends),
        "labels": pad(labels, ends, value=-100),
    }


def packed(tokens):
    """Two of the sequences in one row, each with positions of its own; a first token is predicted by nothing."""
    rows = []
    for first, second in zip(tokens[::2], tokens[1::2], strict=True):
        rest = 2 * LENGTH - len(first) - len(second)
        ids, labels = torch.cat([first, second]), torch.cat([first, second])
        labels[len(first)] = -100
        positions = torch.cat([torch.arange(len(first)), torch.arange(len(second)), torch.arange(rest)])
        pad = torch.nn.functional.pad
        rows.append(
            {
                "input_ids": pad(ids, (0, rest)),
                "position_ids": positions,
                "labels": pad(labels, (0, rest), value=-100),
            }
        )
    return rows


def blocks(tokens):
    """run_clm.py's: all sequences in a row, cut into equal blocks."""
    whole = torch.cat(tokens)
    return [{"input_ids": cut, "labels": cut.clone()} for cut in whole[: len(whole) // 8 * 8].view(-1, 8)]


DATA = {
    "padded right": lambda: [padded(t) for t in sequences()],
    "padded left": lambda: [padded(t, "left") for t in sequences()],
    "completion only": lambda: [padded(t, prompt=2) for t in sequences()],
    "completion only, left": lambda: [padded(t, "left", prompt=2) for t in sequences()],
    "packed": lambda: packed(sequences()),
    "blocks": lambda: blocks(sequences()),
}


class FirstGradient(transformers.TrainerCallback):
    """Keeps the gradient of the first update that it sees."""

    def __init__(self):
        self.gradient = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if self.gradient is None:
            self.gradient = {name: p.grad.clone() for name, p in model.named_parameters()}


def fit(directory, model, data, *, resume=None, stop=None, **arguments):
    """Train in the data's own order, and give the trainer and the first gradient."""
    seen = FirstGradient()
    options = {
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "save_steps": 2,
        "logging_steps": 1,
        "num_train_epochs": 2,
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(directory), **options),
        train_dataset=data,
        callbacks=[seen, *([StopAt(stop)] if stop else [])],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen.gradient


def rows_of(model, task, data, state, folder):
    """ℓ' ∇o of all examples at one state of the model, (N, d) in the order of its parameters; and the bank."""
    size = sum(p.numel() for p in model.parameters())
    bank = sp.build(
        model,
        task,
        sp.Trajectory([sp.Checkpoint(state, step=1, lr=1e-2)]),
        data,
        folder,
        sketch=sp.Sketch(size, kind="identity"),
        storage="float32",
        progress=False,
    )
    blocks = list(bank.stages[0].iter_rows(0))
    return torch.cat([block.rows * block.d1[:, None] for block in blocks]).double(), bank


def counted(kind, example):
    """The Trainer's own count of an example's labels: that of GPT-2 has the first one in it."""
    return int((example["labels"][0 if kind == "gpt2" else 1 :] != -100).sum())


def batch_gradient(rows, data, bank, start, stop, kind):
    """What the rows make of a batch: the mean over its tokens, where rows are weighted for the mean batch's."""
    (mean_tokens,) = bank.task_spec["normalizer"]
    assert mean_tokens == pytest.approx(sum(counted(kind, example) for example in data) / len(data))
    tokens = sum(counted(kind, example) for example in data[start:stop])
    return rows[start:stop].sum(0) * mean_tokens / tokens


def assert_is(gradient, expected):
    whole = torch.cat([g.flatten() for g in gradient.values()]).double()
    assert (expected - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_language_models_divide_by_the_accumulated_count(kind, tmp_path):
    fit(tmp_path, language_model(kind), DATA["padded right"](), max_steps=2, gradient_accumulation_steps=2)
    assert sp.Trajectory.from_hf_trainer(tmp_path, max_grad_norm=0).stages[0].loss_scale == 1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", DATA)
def test_rows_sum_to_the_trainers_gradient(kind, accumulation, name, tmp_path):
    model, data = language_model(kind), DATA[name]()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    _, gradient = fit(tmp_path, model, data, gradient_accumulation_steps=accumulation, max_steps=1, save_strategy="no")
    task = task_for(model)
    assert task.spec() == sp.CausalLM(reduction="token", normalizer="labels" if kind == "gpt2" else None).spec()
    rows, bank = rows_of(model, task, data, state, tmp_path / "bank")
    update = slice(0, min(BATCH * accumulation, len(data)))
    assert_is(gradient, batch_gradient(rows, data, bank, update.start, update.stop, kind))
    if name in ("padded right", "completion only"):  # and a mean over sequences is another loss
        other, _ = rows_of(model, sp.CausalLM(), data, state, tmp_path / "other")
        whole = torch.cat([g.flatten() for g in gradient.values()]).double()
        assert (other[update].mean(0) - whole).norm() > 0.01 * whole.norm()


def test_weights_are_one_on_average_so_that_time_is_the_runs_own(tmp_path):
    model, data = language_model("llama"), DATA["padded right"]()
    _, bank = rows_of(model, task_for(model), data, model.state_dict(), tmp_path)
    tokens = torch.tensor([float(counted("llama", example)) for example in data])
    d1 = torch.cat([block.d1 for block in bank.stages[0].iter_rows(0)])
    torch.testing.assert_close(-d1, tokens / tokens.mean())


def test_a_resumed_run_goes_on_with_the_same_loss(tmp_path):
    data = DATA["padded right"]()
    fit(tmp_path / "run", language_model("gpt2"), data, stop=4, gradient_accumulation_steps=1)
    model = language_model("gpt2")
    checkpoint = tmp_path / "run/checkpoint-4"
    _, gradient = fit(tmp_path / "run", model, data, resume=str(checkpoint), gradient_accumulation_steps=1)
    run = sp.Trajectory.from_hf_trainer(tmp_path / "run", max_grad_norm=0)
    assert run.stages[0].label_smoothing == 0.0
    place = [c.step for c in run.stages[0].checkpoints].index(4)
    state = run.stages[0].checkpoints[place].load()
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    rows, bank = rows_of(model, task_for(model, tmp_path / "run"), data, state, tmp_path / "bank")
    assert_is(gradient, batch_gradient(rows, data, bank, 4 * BATCH, 5 * BATCH, "gpt2"))
    scored = sp.build(model, task_for(model), run, data, tmp_path / "whole", sketch=sp.Sketch(64), progress=False)
    assert sp.Source(scored, model=model, progress=False).score(data[:2]).shape == (2, EXAMPLES)


def classifier(**options):
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(
        vocab_size=30, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        **small, **options,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def labelled(label):
    return [{**padded(t), "labels": label(t)} for t in sequences()]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_classifiers_too_also_with_label_smoothing(smoothing, accumulation, tmp_path):
    model, data = classifier(num_labels=3), labelled(lambda t: int(t[0]) % 3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    options = {"gradient_accumulation_steps": accumulation, "label_smoothing_factor": smoothing, "save_steps": 1}
    _, gradient = fit(tmp_path / "run", model, data, max_steps=2, **options)
    task = task_for(model, tmp_path / "run")
    assert task.label_smoothing == smoothing
    rows, _ = rows_of(model, task, data, state, tmp_path / "bank")
    run = sp.Trajectory.from_hf_trainer(tmp_path / "run", max_grad_norm=0)
    # BERT's classifier is handed the number of labels, and its loss does not use it: nothing divides by accumulation.
    assert run.stages[0].loss_scale == (1 if smoothing else accumulation)
    assert_is(gradient, run.stages[0].loss_scale * rows[: BATCH * accumulation].mean(0))
    with pytest.raises(sp.MismatchError, match=f"was trained with label smoothing {smoothing}, and the task is"):
        sp.build(model, sp.Classification(label_smoothing=0.1), run, data, tmp_path / "other", progress=False)


@pytest.mark.parametrize("outputs", [3, 1])
@pytest.mark.parametrize("name", ["ViT", "VideoMAE", "AST"])
def test_classifiers_of_images_sounds_and_videos_have_the_loss_of_sequences(name, outputs):
    kind = {"ViT": "Image", "VideoMAE": "Video", "AST": "Audio"}[name]
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sound = {"max_length": 8, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4}
    sizes = sound if name == "AST" else {"image_size": 8}
    config = getattr(transformers, f"{name}Config")(**small, **sizes, patch_size=4, num_labels=outputs)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}For{kind}Classification")(config).eval()
    shape = {"ViT": (3, 8, 8), "VideoMAE": (16, 3, 8, 8), "AST": (8, 8)}[name]
    labels = torch.tensor([0, 2]) if outputs > 1 else torch.tensor([0.5, -1.0])
    batch = {"input_values" if name == "AST" else "pixel_values": torch.randn(2, *shape), "labels": labels}
    task, parameters = task_for(model), list(model.parameters())
    value = task.output(model, batch)
    first, _ = task.loss_derivatives(value.detach(), batch)
    got = torch.autograd.grad((first * value).mean(), parameters)
    torch.testing.assert_close(got, torch.autograd.grad(model(**batch).loss, parameters), rtol=1e-4, atol=1e-5)


def test_one_output_is_a_regression(tmp_path):
    model, data = classifier(num_labels=1), labelled(lambda t: float(t[0]) / 30)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    _, gradient = fit(tmp_path, model, data, max_steps=1, save_strategy="no")
    rows, _ = rows_of(model, task_for(model), data, state, tmp_path / "bank")
    assert_is(gradient, rows[:BATCH].mean(0))


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_losses_that_no_task_has_are_refused(kind):
    with pytest.raises(ValueError, match=f"problem_type='{kind}' with 3 outputs"):
        task_for(classifier(num_labels=3, problem_type=kind))


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("BertForTokenClassification", r"give sp.CausalLM\(shift=False, reduction='token'\) \("),
        ("BertForMaskedLM", r"give sp.CausalLM\(shift=False, reduction='token'\) \("),
        ("BertForQuestionAnswering", r"give a task of your own, or sp.CausalLM\(shift=False\) where every token"),
    ],
)
def test_other_models_are_led_to_a_task(kind, remedy):
    with pytest.raises(ValueError, match=f"{kind} is no classifier of whole inputs.*: .*{remedy}"):
        task_for(type(kind, (torch.nn.Module,), {})())


def test_a_smoothed_language_model_is_refused(tmp_path):
    model, data = language_model("gpt2"), DATA["padded right"]()
    fit(tmp_path, model, data, max_steps=2, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"smoothed its labels by 0\.1"):
        task_for(model, tmp_path)
    run = sp.Trajectory.from_hf_trainer(tmp_path, max_grad_norm=0)
    with pytest.raises(sp.MismatchError, match=r"label smoothing 0\.1"):
        sp.build(model, sp.CausalLM(reduction="token"), run, data, tmp_path / "bank", progress=False)


def test_preference_runs_are_refused(tmp_path):
    fit(tmp_path, language_model("gpt2"), DATA["padded right"](), max_steps=2)
    edit_state(tmp_path, 2, lambda state: state["log_history"].append({"step": 2, "rewards/chosen": 0.1}))
    with pytest.raises(ValueError, match=r"logged 'rewards/chosen'.*preferences"):
        sp.Trajectory.from_hf_trainer(tmp_path, max_grad_norm=0)


def test_a_model_card_says_it_where_the_arguments_are_gone(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    assert trainer_arguments(folder) == {}
    (tmp_path / "README.md").write_text("### Training hyperparameters\n- seed: 42\n- label_smoothing_factor: 0.15\n")
    assert trainer_arguments(folder)["label_smoothing_factor"] == 0.15
    (folder / "README.md").write_text("### Training hyperparameters\n- seed: 42\n")
    assert trainer_arguments(folder)["label_smoothing_factor"] == 0.0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_labels_that_were_shifted_already_are_noticed(kind, tmp_path):
    """In the training set and among queries, whichever way round; and only there."""
    model = language_model(kind)
    tokens = (torch.arange(8)[:, None] + torch.arange(10)) % 20 + 3  # each token follows from the one before it
    aligned = [{"input_ids": row, "labels": row.clone()} for row in tokens]
    shifted = [{"input_ids": row[:-1], "labels": row[1:].clone()} for row in tokens]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=60, lr=3e-2)])
    options = {"sketch": sp.Sketch(32), "progress": False}
    for shift, right, wrong, words in (
        (True, aligned, shifted, "shifted already"),
        (False, shifted, aligned, "not sh"),
    ):
        task = sp.CausalLM(shift=shift)
        with pytest.warns(UserWarning, match=rf"labels seem to be {words}.*shift={shift}.*shift={not shift}"):
            sp.build(model, task, run, wrong, tmp_path / f"wrong_{shift}", **options)
        bank = sp.build(model, task, run, right, tmp_path / f"right_{shift}", **options)  # warnings are errors here
        source = sp.Source(bank, model=model, progress=False)
        source.score(right[:3])
        with pytest.warns(UserWarning, match=f"labels seem to be {words}"):
            source.score(wrong[:3])
