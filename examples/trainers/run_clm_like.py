"""Train a language model as transformers' run_clm.py does, and hold its bank against the Trainer's own numbers.

All texts in a row, cut into equal blocks; or, with ``--padded``, a text an example, where the Trainer's loss is a mean
over the tokens of all accumulated batches. Broken off and resumed in either case.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _compare import Comparison, Watch, Watched, first_update, times
from _small import StopAt, language_model, texts, tokenizer
from torch import Tensor
from transformers import Trainer, TrainingArguments

import source_proj as sp
from source_proj.integrations import task_for
from source_proj.integrations.trainer_data import check_training_set

BATCH, ACCUMULATED, STOP, BLOCK = 4, 2, 6, 8


def blocks(sentences: list[list[int]]) -> list[dict[str, Tensor]]:
    """run_clm.py's ``group_texts``: the rest at the end is dropped."""
    whole = torch.tensor([token for sentence in sentences for token in sentence])
    cuts = whole[: len(whole) // BLOCK * BLOCK].view(-1, BLOCK)
    return [{"input_ids": cut, "attention_mask": torch.ones_like(cut), "labels": cut.clone()} for cut in cuts]


def padded(sentences: list[list[int]]) -> list[dict[str, Tensor]]:
    length = max(map(len, sentences))
    rows = []
    for sentence in sentences:
        rest = length - len(sentence)
        ids, mask = torch.tensor(sentence + [0] * rest), torch.tensor([1] * len(sentence) + [0] * rest)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return rows


def fit(folder: Path, train_set: Watched, watch: Watch, stop: int | None = None, **options: Any) -> Trainer:
    model = language_model()
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATED, num_train_epochs=2,
        learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=3, weight_decay=0.1, max_grad_norm=0.0,
        save_steps=3, logging_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callbacks: list[Any] = [StopAt(stop)] if stop else []
    trainer = Trainer(model, arguments, train_dataset=train_set, callbacks=callbacks)
    with watch.over(model):
        trainer.train(**options)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--padded", action="store_true", help="a text an example, in the place of blocks")
    options = parser.parse_args()
    words = tokenizer(closing=False)
    sentences = [list(words(text)["input_ids"]) for text, _ in texts(44, seed=0)]
    data = padded(sentences) if options.padded else blocks(sentences)
    train_set, watch = Watched(data), Watch()
    begin = {name: value.clone() for name, value in language_model().state_dict().items()}
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        fit(run, train_set, watch, STOP)
        resumed_at = len(train_set.order)
        trained: Any = fit(run, train_set, watch, resume_from_checkpoint=str(run / f"checkpoint-{STOP}")).model
        model = trained.eval()
        check_training_set(run, len(data))

        comparison, task = Comparison(), task_for(model, run)
        trajectory = sp.Trajectory.from_hf_trainer(run, model=model, max_grad_norm=0)
        stage = trajectory.stages[0]
        steps = [checkpoint.step for checkpoint in stage.checkpoints]
        comparison.add("times of the checkpoints", times(stage), [sum(watch.rates[:step]) for step in steps])
        for update, place in {0: 0, STOP: resumed_at}.items():
            state = begin if update == 0 else stage.checkpoints[steps.index(update)].load()
            starts = range(place, place + BATCH * ACCUMULATED, BATCH)
            batches = [train_set.order[start : start + BATCH] for start in starts]
            gradient, losses = first_update(model, task, state, batches, data)
            comparison.add(f"gradient of update {update}", gradient, watch.gradients[update])
            comparison.add(f"losses of update {update}", losses, watch.losses[update])
        comparison.finish()
        bank = sp.build(model, task, trajectory, data, Path(temporary) / "bank", sketch=sp.Sketch(64))
        scores = sp.Source(bank, model=model).score(data[:3])
        print(f"scores of {scores.shape[0]} queries against {scores.shape[1]} examples, run ends at {steps[-1]}")


if __name__ == "__main__":
    main()
