"""Texts become tokens as the Trainer's own scripts make them; adapters need no Python either."""

import json
import warnings
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from test_text import TEXTS, WORDS, call, network
from trainer_runs import transformers

import source_proj as sp
from source_proj import MismatchError
from source_proj.integrations import TextData, TextSettings, load_pretrained, task_for, trainable_parameters

PEFT_LAGS = "ignore:.*is deprecated and will be removed:FutureWarning"  # behind names of transformers
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def bert_tokenizer(**options):
    """A tokenizer that puts [CLS] and [SEP] around texts and pairs, as BERT's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: place for place, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    columns = ["input_ids", "token_type_ids", "attention_mask"]
    options = {
        "model_input_names": columns,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "model_max_length": 16,
        **options,
    }
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **options)


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("limit", [4, 7, None])
def test_what_is_too_long_is_cut_by_the_tokenizer(side, limit, tmp_path):
    words = bert_tokenizer(truncation_side=side)
    rows = [{"text": " ".join(WORDS * 3), "label": 1}, {"text": "good film", "label": 0}]
    file, settings = written(tmp_path / "d.jsonl", rows), TextSettings("model", max_length=limit)
    cut = f"1 of the 2 texts of .*d.jsonl.* have more than {limit or 16} tokens and were cut, example 1 .*--max-length"
    with pytest.warns(UserWarning, match=cut):
        data = TextData(file, settings, network("classification"), words)
    own = words([row["text"] for row in rows], truncation=True, max_length=limit or 16, padding=True)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert [data[i][name].tolist() for i in range(2)] == own[name]
    assert data[0]["input_ids"][-1] == 3  # [SEP]


def test_texts_are_no_longer_than_tokens_have_positions(tmp_path):
    """RoBERTa and its kind have rows of positions, of padding and before it, that no token comes to."""
    words = bert_tokenizer(model_max_length=10**9)
    config = transformers.RobertaConfig(
        vocab_size=14, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=14, pad_token_id=1,
    )  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config).eval()
    file = written(tmp_path / "d.jsonl", [{"text": " ".join(WORDS * 3), "label": 1}])
    with pytest.warns(UserWarning, match="more than 12 tokens"):
        data = TextData(file, TextSettings("model"), model, words)
    assert data[0]["input_ids"].shape == (12,)
    model(**{name: column[None] for name, column in data[0].items()})


@pytest.mark.parametrize("kind", ["classification", "language"])
def test_rows_are_filled_up_by_whatever_token_there_is(kind, tmp_path):
    file = written(tmp_path / "d.jsonl", [{"text": "good bad film", "label": 1}, {"text": "good bad", "label": 0}])
    read = partial(TextData, file, TextSettings("model"), network(kind))
    ends = read(bert_tokenizer(pad_token=None, eos_token="[SEP]"))
    assert ends[1]["attention_mask"].tolist() == [1, 1, 1, 1, 0]
    assert ends[1]["input_ids"][-1] == 3
    with pytest.raises(ValueError, match="neither a token for padding nor one that ends a text: set its pad_token"):
        read(bert_tokenizer(pad_token=None))


@pytest.mark.parametrize("nothing", [float("nan"), b"good film"])
def test_what_is_no_text_is_not_read_as_one(nothing, tmp_path):
    rows = [{"text": "good film", "label": 1}, {"text": nothing, "label": 0}]
    with pytest.raises(MismatchError, match="example 2 of the data set has no text in 'text' but "):
        TextData(rows, TextSettings("model"), network("classification"), bert_tokenizer())
    if isinstance(nothing, float):  # JSON of Python's, and of pandas', has NaN
        with pytest.raises(MismatchError, match=r"example 2 of .* has no text in 'text' but nan"):
            TextData(
                written(tmp_path / "d.jsonl", rows), TextSettings("model"), network("classification"), bert_tokenizer()
            )


def test_pairs_are_told_apart(tmp_path):
    words = bert_tokenizer()
    rows = [{"text": TEXTS[i], "second": TEXTS[i + 1], "label": i % 2} for i in range(6)]
    file = written(tmp_path / "d.jsonl", rows)
    data = TextData(file, TextSettings("model", pair="second"), network("classification"), words)
    own = words([r["text"] for r in rows], [r["second"] for r in rows], truncation=True, padding=True)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert [data[i][name].tolist() for i in range(6)] == own[name]
    assert max(map(max, own["token_type_ids"])) == 1
    with pytest.raises(ValueError, match="pair column 'second' is for classifiers"):
        TextData(file, TextSettings("model", pair="second"), network("language"), words)
    with pytest.raises(ValueError, match="prompt column 'second' is for language models"):
        TextData(file, TextSettings("model", prompt="second"), network("classification"), words)
    with pytest.raises(ValueError, match=r"example 1 of .* has no 'third'"):
        TextData(file, TextSettings("model", pair="third"), network("classification"), words)


@pytest.mark.parametrize("prompt", [None, "ask"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("kind", ["classification", "language"])
def test_texts_are_called_cut_where_the_tokenizer_says_more_than_fits(kind, labelled, prompt, tmp_path):
    if kind == "classification" and prompt:
        prompt = None  # is for language models
    words, model = bert_tokenizer(), network(kind)
    random = np.random.default_rng(0)
    for limit in range(3, 14):
        rows = [
            {"ask": "the very", "text": " ".join(random.choice(WORDS, random.integers(1, 12))), "label": 0}
            for _ in range(4)
        ]
        settings = TextSettings("model", prompt=prompt, max_length=limit)
        asked = [f"{row['ask']} {row['text']}" if prompt and labelled else row[prompt or "text"] for row in rows]
        longer = sum(len(words(text)["input_ids"]) > limit for text in asked)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            TextData(written(tmp_path / "d.jsonl", rows), settings, model, words, labelled)
        assert [str(each.message).split(" of the ")[0] for each in caught] == ([str(longer)] if longer else [])


@pytest.mark.parametrize("limit", [16, 6])
def test_an_end_token_stands_behind_the_text_and_not_behind_its_prompt(limit, tmp_path):
    words = bert_tokenizer()
    rows = [{"ask": "the very", "text": "good film was not bad"}]
    settings = TextSettings("model", prompt="ask", max_length=limit)
    with pytest.warns(UserWarning, match="1 of the 1 texts") if limit < 9 else nullcontext():
        data = TextData(written(tmp_path / "d.jsonl", rows), settings, network("language"), words)
    tokens, labels = data[0]["input_ids"].tolist(), data[0]["labels"].tolist()
    whole = words("the very good film was not bad", truncation=True, max_length=limit)["input_ids"]
    assert tokens == whole
    assert labels == [-100, -100, -100, *whole[3:]]


def test_names_of_classes_are_those_of_config_json(tmp_path):
    """transformers forgets a label2id that has no id2label beside it."""
    model = network("classification")
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config = {**config, "label2id": {"ham": 1, "spam": 0, "1": 0}}
    config.pop("id2label")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    words = bert_tokenizer()
    rows = [{"text": "good", "label": label} for label in ("ham", "spam", "1", 0.0, True)]
    data = TextData(
        written(tmp_path / "d.jsonl", rows), TextSettings(str(tmp_path / "model")), network("classification"), words
    )
    assert [int(data[i]["labels"]) for i in range(5)] == [1, 0, 0, 0, 1]
    for label in (1, 1.0):
        again = [*rows, {"text": "good", "label": label}]
        with pytest.raises(
            sp.MismatchError, match=r"example 6 .* class 1, which may be a number or the name of class 0"
        ):
            TextData(again, TextSettings(str(tmp_path / "model")), network("classification"), words)
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(sp.MismatchError, match=r"config.json' is damaged"):
        TextData(tmp_path / "d.jsonl", TextSettings(str(tmp_path / "model")), network("classification"), words)


@pytest.mark.parametrize("offset", [0, 1])
def test_names_in_digits_are_not_mixed_with_numbers(tmp_path, offset):
    """Stars from 1 on: text is a name, a number is one, and a number that is another class's name is refused."""
    names = {str(place + offset): place for place in range(2)}
    settings = TextSettings("model", labels=names)
    made = network("classification"), bert_tokenizer()
    texts = [{"text": "good", "label": name} for name in names]
    assert [int(each["labels"]) for each in TextData(texts, settings, *made)] == [0, 1]
    numbers = [{"text": "good", "label": place} for place in range(2)]
    if offset:
        with pytest.raises(sp.MismatchError, match="may be a number or the name"):
            TextData(numbers, settings, *made)
        with pytest.raises(sp.MismatchError, match=r"example 1 .* has the class '0'"):
            TextData([{"text": "good", "label": "0"}], settings, *made)
    else:
        assert [int(each["labels"]) for each in TextData(numbers, settings, *made)] == [0, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ["good", "bad"], "label": 0}, r"example 2 .* no text in 'text' but \['good', 'bad'\]"),
        ({"text": {"role": "user"}, "label": 0}, "no text in 'text'"),
        ({"text": "good \ud83d", "label": 0}, "example 2 .* holds half of a letter"),
        ({"text": "good", "label": float("nan")}, "example 2 .* has the class nan"),
        ({"text": "good", "label": float("inf")}, "example 2 .* has the class inf"),
        ({"text": "good", "label": 10**400}, "example 2 .* has the class 1000"),
    ],
    ids=["list", "dict", "surrogate", "nan", "inf", "huge"],
)
def test_rows_that_are_no_text_are_named(row, message):
    rows = [{"text": "good", "label": 0}, row]
    with pytest.raises(sp.MismatchError, match=message):
        TextData(rows, TextSettings("model", labels={"ham": 0, "spam": 1}), network("classification"), bert_tokenizer())


def test_a_model_that_was_given_names_by_number_alone_knows_them(tmp_path):
    network("classification").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["id2label"] = {"0": "ham", "1": "spam"}
    config.pop("label2id", None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    rows = [{"text": "good", "label": label} for label in ("spam", "ham", 1)]
    settings = TextSettings(str(tmp_path / "model"))
    data = TextData(written(tmp_path / "d.jsonl", rows), settings, network("classification"), bert_tokenizer())
    assert [int(data[i]["labels"]) for i in range(3)] == [1, 0, 1]


@pytest.fixture(scope="module", params=["SEQ_CLS", "CAUSAL_LM"])
def adapter_run(request, tmp_path_factory):
    """A base model's folder, a Trainer's run of an adapter over it, and the texts of both."""
    peft = pytest.importorskip("peft", reason="needs peft: install source-proj[peft]", exc_type=ImportError)
    directory = tmp_path_factory.mktemp(request.param)
    classifies = request.param == "SEQ_CLS"
    words, base = bert_tokenizer(), network("classification" if classifies else "language")
    base.resize_token_embeddings(len(words))
    base.save_pretrained(directory / "base")
    words.save_pretrained(directory / "base")
    kind = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    torch.manual_seed(1)
    classes = {"num_labels": 3, "ignore_mismatched_sizes": True} if classifies else {}
    model = peft.get_peft_model(
        kind.from_pretrained(directory / "base", **classes),
        peft.LoraConfig(
            task_type=request.param, r=2, target_modules=["query", "value"] if classifies else ["c_attn"],
            fan_in_fan_out=not classifies,
        ),
    )  # fmt: skip
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
    file = written(directory / "train.jsonl", rows[:20])
    written(directory / "queries.jsonl", rows[20:])
    data = TextData(file, TextSettings(str(directory / "base")), model, words)
    arguments = transformers.TrainingArguments(
        str(directory / "run"), num_train_epochs=2, per_device_train_batch_size=5, save_steps=4, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=0,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=data, processing_class=words).train()
    return directory, model


@pytest.mark.filterwarnings(PEFT_LAGS)
def test_an_adapters_run_needs_no_python(adapter_run, tmp_path):
    directory, trained = adapter_run
    options = ("--hf-run", directory / "run", "--dataset", directory / "train.jsonl", "--max-grad-norm", 0)
    call("build", tmp_path / "bank", *options, "--sketch-dim", 64, "--batch-size", 8, "--no-progress")
    bank = sp.open(tmp_path / "bank")
    assert bank.space_spec["names"] == trainable_parameters(trained)
    call(
        "score", tmp_path / "bank", "--dataset", directory / "queries.jsonl", "--out", tmp_path / "s.npy",
        "--no-progress",
    )  # fmt: skip
    last = str(directory / "run" / "checkpoint-8")
    model, words = load_pretrained(last)
    assert type(task_for(model)) is type(task_for(trained))
    own = {name: value for name, value in trained.state_dict().items() if "original_module" not in name}  # unused
    assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())
    queries = TextData(directory / "queries.jsonl", TextSettings(last), model, words)
    scores = sp.Source(bank, model=model, progress=False).score(queries).to_numpy()
    assert np.array_equal(np.load(tmp_path / "s.npy"), scores)
    assert np.abs(scores).max() > 0


@pytest.mark.filterwarnings(PEFT_LAGS)
def test_an_adapters_run_with_another_model_says_how_to_load_it(adapter_run):
    """The optimizer's state was said to have groups of other sizes."""
    directory, _ = adapter_run
    run = directory / "run"
    base, _ = load_pretrained(str(directory / "base"))
    with pytest.raises(sp.MismatchError, match=r"has none: give the model with its adapter, .* leave --hf-model out"):
        sp.Trajectory.from_hf_trainer(run, model=base, max_grad_norm=0)
    model, _ = load_pretrained(str(run / "checkpoint-8"))
    given = {"model": model, "max_grad_norm": 0}
    assert sp.Trajectory.from_hf_trainer(run, **given).stages[0].checkpoints[-1].step == 8
    with pytest.raises(sp.MismatchError, match=r"requires a gradient: load the adapter by .*is_trainable=True"):
        sp.Trajectory.from_hf_trainer(run, **{**given, "model": model.requires_grad_(False)})


@pytest.mark.filterwarnings(PEFT_LAGS)
def test_steps_and_data_of_a_run_on_the_command_line(adapter_run, tmp_path):
    directory, _ = adapter_run
    options = ("--hf-run", directory / "run", "--sketch-dim", 64, "--no-progress", "--max-grad-norm", 0)
    train_set = ("--dataset", directory / "train.jsonl")
    call("build", tmp_path / "bank", *options, *train_set, "--steps", "4")
    bank = sp.open(tmp_path / "bank")
    assert [bank.checkpoint(0, c).step for c in range(bank.stages[0].n_checkpoints)] == [4]
    beside = json.loads((tmp_path / "bank.text.json").read_text())
    assert beside["text"]["model"] == str(directory / "run" / "checkpoint-4")
    assert "must be numbers of steps" in call("build", tmp_path / "b", *options, *train_set, "--steps", "4;8", code=2)
    assert "JSON object" in call("build", tmp_path / "b", *options, *train_set, "--schedule-options", "min_lr", code=2)
    few = directory / "queries.jsonl"
    assert "rule that out" in call("build", tmp_path / "b", *options, "--dataset", few, code=1)
    rates = ("--schedule", "cosine_with_min_lr", "--schedule-options", '{"min_lr": 1e-3}', "--warmup-steps", "0")
    assert "does not give the learning rates" in call("build", tmp_path / "b", *options, *train_set, *rates, code=2)


@pytest.mark.parametrize("told", [True, False])
def test_a_loss_of_routing_is_no_examples_own(told):
    options = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(
        vocab_size=9, intermediate_size=8, num_local_experts=2, output_router_logits=told, **options
    )
    model = transformers.MixtralForCausalLM(config)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        task_for(model)
    assert told is any("router_aux_loss_coef" in str(each.message) for each in said)
