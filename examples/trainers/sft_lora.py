"""Fine-tune LoRA with TRL's SFTTrainer on completions alone, and hold a bank against the trainer's own numbers.

The model is then loaded from the run's last checkpoint, as ``source-proj build --hf-run`` does: the base model that the
adapter names, and the adapter over it.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from _compare import Comparison, Watch, Watched, first_update, times
from _small import language_model, texts, tokenizer
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import source_proj as sp
from source_proj.integrations import load_pretrained, task_for, trainable_parameters
from source_proj.integrations.trainer_data import check_training_set

BATCH, ACCUMULATED = 4, 2


def fit(folder: Path, base: Path, watch: Watch) -> tuple[Watched, list[dict[str, Tensor]], dict[str, Tensor]]:
    """Train; gives the examples, the same padded to one length, and the trained weights before the first update."""
    last = {"positive": "good film", "negative": "awful"}
    pairs = [{"prompt": f"{text} is", "completion": f" so {last[label]}"} for text, label in texts(40, seed=0)]
    arguments = SFTConfig(
        str(folder), per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATED, num_train_epochs=2,
        learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=0.0, save_steps=4,
        logging_steps=3, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        completion_only_loss=True, max_length=32,
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base), arguments, train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(closing=False),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    rows = list(trainer.train_dataset)
    columns = trainer.data_collator(rows)
    data = [{name: columns[name][i] for name in columns} for i in range(len(rows))]
    begin = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    train_set = Watched(rows)
    trainer.train_dataset = train_set
    with watch.over(trainer.model):
        trainer.train()
    return train_set, data, begin


def main() -> None:
    watch = Watch()
    with tempfile.TemporaryDirectory() as temporary:
        run, base = Path(temporary) / "run", Path(temporary) / "base"
        language_model(base)
        train_set, data, begin = fit(run, base, watch)
        check_training_set(run, len(data))
        last = max(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.removeprefix("checkpoint-")))
        model, _ = load_pretrained(str(last))
        comparison, task = Comparison(), task_for(model, run)
        trajectory = sp.Trajectory.from_hf_trainer(run, model=model, max_grad_norm=0)
        stage = trajectory.stages[0]
        steps = [checkpoint.step for checkpoint in stage.checkpoints]
        comparison.add("times of the checkpoints", times(stage), [sum(watch.rates[:step]) for step in steps])
        starts = range(0, BATCH * ACCUMULATED, BATCH)
        batches = [train_set.order[start : start + BATCH] for start in starts]
        gradient, losses = first_update(model, task, {**model.state_dict(), **begin}, batches, data)
        comparison.add("gradient of update 0", gradient, watch.gradients[0])
        comparison.add("losses of update 0", losses, watch.losses[0])
        saved, own = load_file(last / "adapter_model.safetensors"), dict(model.named_parameters())
        names = {name: name.replace(".default", "") for name in trainable_parameters(model)}
        mine: Any = torch.cat([own[name].detach().flatten() for name in names])
        comparison.add("adapter of the last checkpoint", mine, torch.cat([saved[n].flatten() for n in names.values()]))
        comparison.finish()
        bank = sp.build(model, task, trajectory, data, Path(temporary) / "bank", sketch=sp.Sketch(64))
        attributed = set(bank.space_spec["names"])
        if attributed != set(names):
            raise SystemExit(f"FAILED: the bank is of {len(attributed)} weights, and the adapter has {len(names)}")
        scores = sp.Source(bank, model=model).score(data[:3])
        print(f"scores of {scores.shape[0]} queries against {scores.shape[1]} examples, run ends at {steps[-1]}")


if __name__ == "__main__":
    main()
