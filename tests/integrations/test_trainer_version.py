"""The version of transformers that trained is the run's word, not that of whoever saved the model's configuration."""

import json

import pytest
import torch
from trainer_runs import classifier, transformers

import source_proj as sp
from source_proj.integrations import RecorderCallback, task_for
from source_proj.integrations.callback_log import CallbackLog
from source_proj.integrations.trainer_arguments import accumulated_undivided, trainer_version

NEW, OLD = "5.10.0", "4.40.0"


def llama(version):
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **small))
    model.config.transformers_version = version
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a model that an older version saved, and what its first step moved the weights by."""
    directory, model = tmp_path_factory.mktemp("run"), llama(OLD)
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": row, "labels": row.clone()} for row in torch.randint(0, 20, (8, 5), generator=generator)]
    arguments = transformers.TrainingArguments(
        str(directory / "run"), use_cpu=True, report_to=[], disable_tqdm=True, optim="sgd", learning_rate=0.1,
        max_steps=1, per_device_train_batch_size=8, max_grad_norm=0.0, lr_scheduler_type="constant", save_steps=1,
    )  # fmt: skip
    callback = RecorderCallback(directory / "recorded")
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    moved = torch.cat([(begun[name] - p).detach().flatten() for name, p in model.named_parameters()])
    return directory, begun, rows, moved


@pytest.mark.parametrize("place", ["run", "recorded"])
@pytest.mark.parametrize("version", [OLD, "5.9.3", NEW, None])
def test_rows_sum_to_the_runs_step_whatever_version_the_model_has(run, tmp_path, place, version):
    directory, begun, rows, moved = run
    model = llama(version)
    task = task_for(model, directory / place)
    bank = sp.build(
        model, task, sp.Trajectory([sp.Checkpoint(begun, step=1, lr=0.1)]), rows, tmp_path / "bank",
        sketch=sp.Sketch(len(moved), kind="identity"), storage="float32", progress=False,
    )  # fmt: skip
    gradient = torch.cat([block.rows * block.d1[:, None] for block in bank.stages[0].iter_rows(0)]).mean(0)
    assert float(moved @ gradient / gradient.square().sum()) == pytest.approx(0.1, rel=1e-4)  # weights in float32


@pytest.mark.parametrize(("told", "normalizer"), [(OLD, "labels"), ("5.9.3", "labels"), (NEW, None), ("6.0", None)])
def test_a_checkpoints_configuration_and_a_callbacks_log_say_it(run, tmp_path, told, normalizer):
    directory, *_ = run
    expected = sp.CausalLM(reduction="token", normalizer=normalizer).spec()
    checkpoint = tmp_path / "run/checkpoint-1"
    checkpoint.mkdir(parents=True)
    for file in (directory / "run/checkpoint-1").iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "transformers_version": told}))
    lines = (directory / "recorded/updates.jsonl").read_text()
    settings = CallbackLog.open(directory / "recorded").settings
    assert settings.transformers == transformers.__version__
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded/updates.jsonl").write_text(lines.replace(f'"{settings.transformers}"', f'"{told}"'))
    for version in (OLD, NEW):
        for place in ("run", "recorded"):
            assert task_for(llama(version), tmp_path / place).spec() == expected
    assert task_for(llama(told)).spec() == expected  # where no run is given


def test_a_model_card_says_it_of_adapters(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    assert trainer_version(checkpoint) is None
    (tmp_path / "README.md").write_text(
        "### Framework versions\n\n- PEFT 0.19.1\n- Transformers 4.57.1\n- Pytorch 2.9\n"
    )
    assert trainer_version(checkpoint) == "4.57.1"
    (tmp_path / "README.md").write_text("### Framework versions\n\n- TRL: 1.0.0\n- Transformers: 5.10.2\n")
    assert trainer_version(checkpoint) == "5.10.2"
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(sp.MismatchError, match=r"config.json' is damaged"):
        trainer_version(checkpoint)


@pytest.mark.parametrize(("version", "count"), [("4.45.2", 1), ("4.46.0", 4), ("5.24.0", 4), (None, 4)])
def test_older_trainers_divide_by_accumulated_batches(version, count):
    assert accumulated_undivided({"gradient_accumulation_steps": 4.0}, classifier(), version) == count
