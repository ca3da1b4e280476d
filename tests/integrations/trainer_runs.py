"""Runs of transformers' Trainer over models of a thousand parameters."""

import json
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: install source-proj[hf]")
pytest.importorskip("accelerate", reason="needs accelerate: install source-proj[hf]")

EXAMPLES, BATCH = 40, 4
STEPS = 20  # of two epochs


def classifier():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    return transformers.BertForSequenceClassification(config)


def examples():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 20, (EXAMPLES, 6), generator=generator)
    return [{"input_ids": row.tolist(), "labels": int(row[0]) % 2} for row in tokens]


class SaveAt(transformers.TrainerCallback):
    """Saves after given steps, beside the Trainer's own."""

    def __init__(self, steps=()):
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        control.should_save |= state.global_step in self.steps


def train(
    directory,
    *,
    model=None,
    resume=None,
    stop=None,
    callbacks=(),
    optimizers=(None, None),
    data=None,
    eval_data=None,
    **arguments,
):
    """Train as the Trainer does by default (AdamW, linear decay, clipping at 1), saving every four steps."""
    torch.manual_seed(0)
    model = model or classifier()
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "save_steps": 4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(directory), **options),
        train_dataset=data or examples(),
        eval_dataset=eval_data,
        optimizers=optimizers,
        callbacks=[*callbacks, *([StopAt(stop)] if stop else [])],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class StopAt(transformers.TrainerCallback):
    """Ends a run early, as a kill would, but with its checkpoint written."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step >= self.step


def history(directory, step):
    return json.loads((directory / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


def edit_state(directory, step, change):
    """Rewrite a trainer_state.json."""
    file = directory / f"checkpoint-{step}" / "trainer_state.json"
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))


def copied(source, target):
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target
