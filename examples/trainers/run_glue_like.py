"""Train a classifier as transformers' run_glue.py does, and hold its bank against the Trainer's own numbers.

Texts with named classes, padded batch by batch, accumulated gradients, clipping, a run that is broken off and resumed,
and ``load_best_model_at_end``. The training set is then read from the run's CSV file, as the command line does it.
"""

import csv
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from _compare import Comparison, Watch, Watched, first_update, times
from _small import StopAt, classifier, texts, tokenizer
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer, TrainingArguments

import source_proj as sp
from source_proj.integrations import TextData, TextSettings, load_pretrained, task_for

BATCH, ACCUMULATED, STOP = 4, 2, 6  # the run stops within the second epoch


def fit(folder: Path, train_set: Watched, watch: Watch, **options: Any) -> Trainer:
    """Train, or go on; options are as of ``Trainer.train`` and the step to stop at."""
    words, model, stop = tokenizer(closing=True), classifier(), options.pop("stop", None)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATED, num_train_epochs=3,
        learning_rate=2e-2, warmup_steps=2, weight_decay=0.1, eval_strategy="steps", eval_steps=2, save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="accuracy", logging_steps=1, report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=train_set, eval_dataset=encoded(texts(20, seed=1)), processing_class=words,
        data_collator=DataCollatorWithPadding(words), compute_metrics=accuracy, callbacks=[StopAt(stop)] * bool(stop),
    )  # fmt: skip
    with watch.over(model):
        trainer.train(**options)
    return trainer


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits: Any = prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def encoded(sentences: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """What run_glue.py's preprocessing makes of sentences: tokens unpadded, classes as numbers."""
    numbers: Any = classifier().config.label2id
    words = tokenizer(closing=True)
    return [{**words(text, truncation=True), "labels": numbers[label]} for text, label in sentences]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        run, file = Path(temporary) / "run", Path(temporary) / "train.csv"
        sentences = texts(38, seed=0)
        with file.open("w", newline="", encoding="utf-8") as lines:
            csv.writer(lines).writerows([("sentence", "label"), *sentences])
        train_set, watch = Watched(encoded(sentences)), Watch()
        begin = {name: value.clone() for name, value in classifier().state_dict().items()}
        fit(run, train_set, watch, stop=STOP)
        resumed_at = len(train_set.order)
        trainer = fit(run, train_set, watch, resume_from_checkpoint=str(run / f"checkpoint-{STOP}"))
        trainer.save_model()

        model, words = load_pretrained(str(run))
        data = TextData(file, TextSettings(str(run), text="sentence"), model, words)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the best model is not the last, which is compared here
            best = sp.Trajectory.from_hf_trainer(run, model=model)
        steps = sorted(int(folder.name.removeprefix("checkpoint-")) for folder in run.glob("checkpoint-*"))
        whole = sp.Trajectory.from_hf_trainer(run, model=model, steps=steps).stages[0]

        comparison = Comparison()
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        clips = [float(gradient.norm()) / norm for gradient, norm in zip(watch.gradients, norms, strict=True)]
        # BERT's classifier leaves the division by the number of micro-batches to nobody: their gradients are summed.
        moved = [rate * ACCUMULATED * clip for rate, clip in zip(watch.rates, clips, strict=True)]
        theirs = [sum(moved[:step]) for step in steps]
        comparison.add("times of the checkpoints", times(whole), theirs)
        factors: Any = whole.clip_factors
        places = {0: 0, STOP: resumed_at}
        for update, place in places.items():
            state = begin if update == 0 else whole.checkpoints[steps.index(update)].load()
            starts = range(place, place + BATCH * ACCUMULATED, BATCH)
            batches = [train_set.order[start : start + BATCH] for start in starts]
            gradient, losses = first_update(model, task_for(model, run), state, batches, data)
            scaled = whole.loss_scale * factors[update] * gradient
            comparison.add(f"gradient of update {update}", scaled, watch.gradients[update])
            summed = [whole.loss_scale * loss for loss in losses]
            comparison.add(f"losses of update {update}", summed, watch.losses[update])
        trained: Any = trainer.model
        mine, own = best.final.load(), trained.state_dict()
        comparison.add("weights of the best model", *(torch.cat([s[n].flatten() for n in own]) for s in (mine, own)))
        comparison.finish()
        bank = sp.build(model, task_for(model, run), best, data, Path(temporary) / "bank", sketch=sp.Sketch(64))
        scores = sp.Source(bank, model=model).score([data[i] for i in range(3)])
        print(f"scores of {scores.shape[0]} queries against {scores.shape[1]} sentences, run ends at {best.final.step}")


if __name__ == "__main__":
    main()
