r"""Train with the Trainer, build the bank, and follow both where you follow your runs.

    python examples/trainers/tracked_run.py                          # prints
    python examples/trainers/tracked_run.py --tracker tensorboard    # or wandb, trackio; each needs its package

The Trainer logs its losses by ``report_to``; the learning rates and checkpoints that attribution needs are recorded by
the callback. The bank's build and the fit then tell their progress to a function of (description, done, total), which
is all that a tracker needs. W&B runs offline unless WANDB_MODE says otherwise.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _small import classifier, texts, tokenizer
from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import source_proj as sp
from source_proj.integrations import RecorderCallback, task_for

Log = Callable[[dict[str, float]], Any]
TRACKERS = ("print", "wandb", "tensorboard", "trackio")
SENTENCES, SHARE = 64, 0.25  # progress is told after every such share of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracker", choices=TRACKERS, default="print", help="where numbers go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ.setdefault("WANDB_MODE", "offline")
        words, model = tokenizer(closing=True), classifier()
        train_set = encoded(texts(SENTENCES, seed=0), words)
        recorder: Any = RecorderCallback(folder / "run", every=8)
        arguments = TrainingArguments(
            str(folder / "trainer"), num_train_epochs=2, per_device_train_batch_size=8, learning_rate=1e-2,
            logging_steps=4, report_to=[options.tracker] if options.tracker != "print" else [], disable_tqdm=True,
            save_strategy="no", use_cpu=True,
        )  # fmt: skip
        Trainer(
            model, arguments, train_dataset=train_set, data_collator=DataCollatorWithPadding(words),
            callbacks=[recorder],
        ).train()  # fmt: skip

        rows = [{**row, "labels": row.pop("label")} for row in padded(train_set, words)]
        log = tracker(options.tracker)  # after training, at whose end the Trainer closes trackio's run
        follow = progress(log)
        bank = sp.build(
            model, task_for(model), recorder.trajectory(), rows, folder / "bank", sketch=sp.Sketch(64), batch_size=8,
            progress=follow,
        )  # fmt: skip
        hits = sp.Source(bank, model=model, progress=follow).top_k(rows[:4], k=3)
        log({"strongest score": float(hits.scores.max())})


def tracker(name: str) -> Log:
    """A function that logs named numbers."""
    if name == "wandb":
        import wandb

        log: Log = wandb.init(project="source-proj").log
        return log
    if name == "trackio":
        import trackio

        trackio.init(project="source-proj")
        return lambda numbers: trackio.log(numbers)
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer, steps = SummaryWriter(), iter(range(1 << 60))
        return lambda numbers: writer.add_scalars("source-proj", numbers, next(steps))
    return lambda numbers: print("  ".join(f"{what} {number:.3g}" for what, number in numbers.items()))


def progress(log: Log) -> Callable[[str, int, int], None]:
    """Log what part of each step is done, at every ``SHARE`` of it."""
    told: dict[str, int] = {}

    def follow(description: str, done: int, total: int) -> None:
        part = int(done / total / SHARE)
        if part > told.get(description, 0):
            told[description] = part
            log({description: done / total})

    return follow


def encoded(examples: list[tuple[str, str]], words: Any) -> Dataset:
    """Sentences as token ids, with labels as numbers."""
    rows = [{**words(text), "label": int(label == "negative")} for text, label in examples]
    return Dataset.from_list([{k: row[k] for k in ("input_ids", "attention_mask", "label")} for row in rows])


def padded(train_set: Dataset, words: Any) -> list[dict[str, Any]]:
    """The same rows, all of one length."""
    batch = words.pad(train_set.to_dict(), padding="longest", return_tensors="pt")
    return [{name: values[i] for name, values in batch.items()} for i in range(len(train_set))]


if __name__ == "__main__":
    main()
