"""What the examples of trainers train: generated texts, a tokenizer of words, models of a few thousand weights."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

__all__ = ["StopAt", "classifier", "language_model", "texts", "tokenizer"]

WORDS = ("the", "a", "film", "plot", "cast", "music", "is", "was", "so", "very", "dull", "awful", "good", "superb")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


class StopAt(TrainerCallback):
    """Ends a run early, as a kill would, but with its checkpoint written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Stop once the step is reached."""
        del args
        control.should_training_stop |= state.global_step >= self.step
        return control


def texts(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences of 4 to 12 words, each with the name of its class, which its last word decides but for some errors."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(4, 12))
        good = words[-1] in WORDS[len(WORDS) // 2 :]
        made.append((" ".join(words), "positive" if good != (rng.random() < 0.1) else "negative"))
    return made


def tokenizer(closing: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words.

    Args:
        closing: put [CLS] and [SEP] around a text, as BERT's does.
    """
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if closing:
        model.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="[SEP]", model_max_length=32, **named)


def classifier() -> BertForSequenceClassification:
    """A BERT of two classes without dropout, so that a bank's rows can be compared with the Trainer's gradient."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, label2id={"positive": 0, "negative": 1},
        id2label={0: "positive", 1: "negative"}, **SHAPE,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def language_model(folder: Path | None = None) -> LlamaForCausalLM:
    """A Llama; saved to a folder with its tokenizer, if one is given."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), max_position_embeddings=32, pad_token_id=0, eos_token_id=3,
        bos_token_id=2, **SHAPE,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer(closing=False).save_pretrained(folder)
    return model
