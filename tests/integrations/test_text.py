"""From a Trainer's run and a text file to scores, by the command line alone."""

import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from trainer_runs import transformers
from typer.testing import CliRunner

import source_proj as sp
from source_proj.cli import app, text
from source_proj.integrations import TextData, TextSettings, load_pretrained, task_for

WORDS = ["good", "bad", "film", "book", "was", "the", "a", "not", "very", "plain"]
TEXTS = [" ".join(WORDS[(3 * i + j * (1 + i % 3)) % 10] for j in range(2 + i % 5)) for i in range(24)]
LABELS = [i % 2 for i in range(24)]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )


def network(kind):
    torch.manual_seed(0)
    if kind == "classification":
        config = transformers.BertConfig(
            vocab_size=12,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=16,
            label2id={"bad": 0, "good": 1},
            id2label={0: "bad", 1: "good"},
        )
        return transformers.BertForSequenceClassification(config)
    config = transformers.GPT2Config(
        vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="module", params=["classification", "language"])
def run(request, tmp_path_factory):
    """A directory with text files and what the Trainer left of a model trained on them."""
    directory = tmp_path_factory.mktemp(request.param)
    for name, rows in (("train", range(20)), ("queries", range(20, 24))):
        lines = [{"text": TEXTS[i], "label": "good" if LABELS[i] else "bad"} for i in rows]
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        with (directory / f"{name}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, ["text", "label"])
            table.writeheader()
            table.writerows(lines)
    model, words = network(request.param), tokenizer()
    model.save_pretrained(directory / "model")
    words.save_pretrained(directory / "model")
    data = TextData(directory / "train.jsonl", TextSettings("model"), model, words)
    arguments = transformers.TrainingArguments(
        str(directory / "run"),
        num_train_epochs=2,
        per_device_train_batch_size=5,
        save_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(model, arguments, train_dataset=data, processing_class=words).train()
    return request.param, directory


def call(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stderr if code else result.stdout


def build(directory, bank, *words, file="train.jsonl", code=0):
    options = ("--hf-run", directory / "run", "--dataset", directory / file, "--sketch-dim", 64, "--batch-size", 8)
    return call("build", bank, *options, "--no-progress", *words, code=code)


def test_build_and_score_without_python_equal_those_with_it(run, tmp_path):
    kind, directory = run
    build(directory, tmp_path / "bank", "--hf-model", directory / "model", "--segments", 2)
    queries = ("--dataset", directory / "queries.jsonl")
    call("score", tmp_path / "bank", *queries, "--out", tmp_path / "scores.npy", "--no-progress")
    model, words = load_pretrained(str(directory / "model"))
    settings, task = TextSettings(str(directory / "model")), task_for(model)
    data = TextData(directory / "train.jsonl", settings, model, words)
    trajectory = sp.Trajectory.from_hf_trainer(directory / "run", segments=2, model=model)
    bank = sp.build(
        model, task, trajectory, data, tmp_path / "b", sketch=sp.Sketch(dim=64), batch_size=8, progress=False
    )
    asked = TextData(directory / "queries.jsonl", settings, model, words)
    expected = sp.Source(bank, model=model, progress=False).score(asked).to_numpy()
    assert np.array_equal(np.load(tmp_path / "scores.npy"), expected)
    assert isinstance(task, sp.Classification if kind == "classification" else sp.CausalLM)


def test_the_model_is_the_runs_last_checkpoint_unless_it_is_named(run, tmp_path):
    _, directory = run
    build(directory, tmp_path / "bank", file="train.csv")
    beside = json.loads((tmp_path / "bank.text.json").read_text())
    assert beside["text"]["model"] == str(directory / "run" / "checkpoint-8")
    assert (beside["build"]["sketch_dim"], beside["build"]["hf_run"]) == (64, str(directory / "run"))
    hits = call("top-k", tmp_path / "bank", "--dataset", directory / "queries.csv", "-k", 2, "--json", "--no-progress")
    assert [len(query["train"]) for query in json.loads(hits)["queries"]] == [2, 2, 2, 2]


def test_answers_show_texts_and_are_about_the_models_own_where_there_are_no_labels(run, tmp_path):
    kind, directory = run
    build(directory, tmp_path / "bank")
    ask = ("top-k", tmp_path / "bank", "-k", 2, "--no-progress", "--dataset")
    told = json.loads(call(*ask, directory / "queries.jsonl", "--json"))["queries"]
    assert [query["text"] for query in told] == TEXTS[20:]
    assert all(entry["text"] == TEXTS[entry["id"]] for query in told for entry in query["train"])
    if kind == "classification":
        assert all(entry["label"] == ("good" if LABELS[entry["id"]] else "bad") for entry in told[0]["train"])
    text = call(*ask, directory / "queries.jsonl")
    assert TEXTS[20] in text
    assert TEXTS[told[0]["train"][0]["id"]][:60] in text
    (tmp_path / "plain.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[20:22]))
    own = json.loads(call(*ask, tmp_path / "plain.jsonl", "--json", "--target", "predicted"))["queries"]
    assert [query["text"] for query in own] == TEXTS[20:22]
    if kind == "classification":
        assert {query["predicted"] for query in own} <= {"good", "bad"}
        assert json.loads(call(*ask, tmp_path / "plain.jsonl", "--json"))["queries"] == own
    else:
        words = {word for query in own for word in query["continued_by"].split()}
        assert words <= {"[PAD]", "[UNK]", *WORDS}
    assert all(0 < query["probability"] <= 1 for query in own)


def test_single_tokens_are_asked_about(run, tmp_path):
    kind, directory = run
    build(directory, tmp_path / "bank")
    words = (
        "top-k",
        tmp_path / "bank",
        "--dataset",
        directory / "queries.jsonl",
        "--per-token",
        "--json",
        "--no-progress",
    )
    if kind == "classification":
        assert "belongs to language models" in call(*words, code=2)
        return
    ids = [query["query"] for query in json.loads(call(*words))["queries"]]
    counts = [len(text.split()) - 1 for text in TEXTS[20:]]
    assert ids == [f"{i}/{t + 1}" for i, count in enumerate(counts) for t in range(count)]


def test_padding_prompts_and_labels(run, tmp_path):
    kind, directory = run
    model, words = load_pretrained(str(directory / "model"))
    file = tmp_path / "data.jsonl"
    rows = [{"text": "good film", "ask": "the very", "label": 1}, {"text": "bad", "ask": "a", "label": "0"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    if kind == "classification":
        data = TextData(file, TextSettings("model"), model, words)
        assert [int(data[i]["labels"]) for i in range(2)] == [1, 0]
        assert data[1]["attention_mask"].tolist() == [1, 0]
        return
    with pytest.warns(UserWarning, match="1 of the 2 texts of .* have more than 3 tokens and were cut, example 1"):
        data = TextData(file, TextSettings("model", prompt="ask", max_length=3), model, words)
    ids = {word: place + 2 for place, word in enumerate(WORDS)}
    assert data[0]["input_ids"].tolist() == [ids["the"], ids["very"], ids["good"]]
    assert data[0]["labels"].tolist() == [-100, -100, ids["good"]]
    assert data[1]["input_ids"].tolist() == [ids["a"], ids["bad"], 0]
    assert data[1]["labels"].tolist() == [-100, ids["bad"], -100]


def test_files_that_are_wrong_are_named_by_their_example(run, tmp_path):
    kind, directory = run
    model, words = load_pretrained(str(directory / "model"))

    def read(text, name="data.jsonl", **columns):
        (tmp_path / name).write_text(text)
        return TextData(tmp_path / name, TextSettings("model", **columns), model, words)

    good = '{"text": "good", "label": 1}\n'
    with pytest.raises(ValueError, match=r"example 2 of .* has no 'text', only"):
        read(good + '{"words": "bad", "label": 1}')
    with pytest.raises(ValueError, match=r"line 2 is no JSON object"):
        read(good + "nonsense")
    with pytest.raises(ValueError, match=r"must be a .jsonl, .csv, .tsv or .parquet file"):
        read(good, "data.txt")
    with pytest.raises(ValueError, match="holds no example"):
        read("")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TextData(tmp_path / "none.csv", TextSettings("model"), model, words)
    with pytest.raises(ValueError, match=r"example 1 of .* has no token"):
        read('{"text": "", "label": 1}')
    if kind == "classification":
        with pytest.raises(ValueError, match="has the class 'superb'; the model knows 0 to 1"):
            read('{"text": "good", "label": "superb"}')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no example"),
        ('{"text": "good"', "line 1 is no JSON object"),
        ('{"words": "good", "label": 1}', "example 1 of .* has no 'text', only"),
    ],
)
def test_what_is_wrong_within_a_file_has_the_exit_code_of_bad_data(run, tmp_path, content, message):
    _, directory = run
    (tmp_path / "data.jsonl").write_text(content)
    assert re.search(message, build(directory, tmp_path / "bank", file=tmp_path / "data.jsonl", code=1))
    assert "does not exist" in build(directory, tmp_path / "bank", file=tmp_path / "no.jsonl", code=2)


def test_options_that_contradict_each_other(run, tmp_path):
    _, directory = run
    bank = tmp_path / "bank"
    assert "leave one pair out" in build(directory, bank, "--model", "m:f", code=2)
    assert "needs --dataset FILE" in call("build", bank, "--hf-model", directory / "model", code=2)
    assert "--warmup-steps belongs to --hf-run" in call(
        "build", bank, "--hf-model", directory / "model", "--dataset", directory / "train.csv", "--lr", 1,
        "--checkpoint", f"4={directory / 'run/checkpoint-4/model.safetensors'}", "--warmup-steps", 3, code=2,
    )  # fmt: skip
    assert "--data is missing: give it, or a text file" in call("build", bank, "--model", "os:getpid", code=2)
    assert "is missing" in call("score", bank, "--out", tmp_path / "s.npy", code=2)
    assert f"there is no bank at {bank}" in call(
        "score", bank, "--dataset", directory / "queries.csv", "--out", tmp_path / "s.npy", code=1
    )


def test_a_model_that_is_no_folder_is_refused_before_the_hub_is_asked(run, tmp_path, monkeypatch):
    _, directory = run
    build(directory, tmp_path / "bank")
    beside = tmp_path / "bank.text.json"
    beside.write_text(beside.read_text().replace(str(directory / "run" / "checkpoint-8"), "moved"))

    def asked(name, **_):
        raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", asked)
    said = build(directory, tmp_path / "new", "--hf-model", "nope", code=2)
    assert "--hf-model 'nope' is no folder here: give the folder that model.save_pretrained" in said
    said = call("top-k", tmp_path / "bank", "--dataset", directory / "queries.csv", code=2)
    assert "was built with, 'moved' is no folder here: put it back" in said
    for path in ("./nope", "a/b/c", str(tmp_path / "nope")):
        with pytest.raises(FileNotFoundError, match=f"the model '{path}' is no folder here"):
            load_pretrained(path)
    for name in ("bert-base-uncased", "owner/model"):  # names of the hub are its own
        with pytest.raises(AssertionError, match=f"asked for {name}"):
            load_pretrained(name)


def test_texts_that_nobody_tokenised_name_the_remedy(run, tmp_path):
    kind, directory = run
    build(directory, tmp_path / "bank", "--segments", 1)
    source = sp.Source(sp.open(tmp_path / "bank"), model=network(kind), progress=False)
    for query in ({"text": TEXTS[0], "label": "good"}, {"text": TEXTS[0]}, TEXTS[0]):
        with pytest.raises(TypeError, match=r"text.*tokenise as in training.*TextBank\(path\).read\(rows\)"):
            source.helpful([query], k=1)


def test_columns_and_texts_that_are_not_there_name_what_to_do(run, tmp_path):
    kind, directory = run
    told = build(directory, tmp_path / "b", "--text-column", "sentence", code=1)
    assert "has no 'sentence', only ['label', 'text']; TextSettings(text=...) (--text-column of" in told
    if kind == "language":
        (tmp_path / "short.jsonl").write_text('{"text": "good bad"}\n{"text": "good"}\n')
        message = build(directory, tmp_path / "b", file=tmp_path / "short.jsonl", code=1)
        assert "example 2 of" in message
        assert "has one token" in message
    asked = ("top-k", tmp_path / "b", "--model", "torch.nn:Identity", "--queries", directory / "queries.jsonl")
    assert "files of texts go to --dataset" in call(*asked, code=2)


def test_the_folder_of_a_run_is_no_model(run, tmp_path):
    _, directory = run
    options = ("--hf-model", directory / "run", "--hf-run", directory / "run", "--dataset", directory / "train.jsonl")
    message = call("build", tmp_path / "bank", *options, code=1)
    assert "holds no model (no config.json)" in message
    assert str(directory / "run" / "checkpoint-8") in message


def test_no_bar_is_shown_where_none_is_wanted(run, tmp_path, capfd):
    _, directory = run
    build(directory, tmp_path / "bank", "--hf-model", directory / "model")
    assert "Loading weights" not in capfd.readouterr().err


CODE_OF_A_STRANGER = """
from pathlib import Path
from transformers import PretrainedConfig

Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()

class E(PretrainedConfig):
    model_type = "strange"
"""


@pytest.mark.parametrize("answer", ["y\n", "n\n", ""])
def test_code_in_a_models_directory_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch, answer):
    marker = tmp_path / "ran"
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "strange.E"}, "architectures": ["E"]}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "strange.py").write_text(CODE_OF_A_STRANGER.format(marker=str(marker)))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_pretrained(str(tmp_path / "model"))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["AutoModel", "pipeline", "__name__", "absent"])
def test_only_a_model_of_transformers_is_loaded(tmp_path, name):
    network("classification").config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    with pytest.raises(ValueError, match="which transformers does not have"):
        load_pretrained(str(tmp_path))


def test_a_page_needs_no_more_than_the_bank(run, tmp_path, monkeypatch):
    pytest.importorskip("starlette", reason="the page is served by the explore extra")
    monkeypatch.setattr(text, "_OWN_QUERIES", 5)
    _, directory = run
    file = directory / "own.jsonl"
    file.write_bytes((directory / "train.jsonl").read_bytes())
    build(directory, tmp_path / "bank", file="own.jsonl")
    call("explore", tmp_path / "bank", "--static", tmp_path / "page", "--no-progress")
    data = json.loads((tmp_path / "page" / "data.js").read_text().removeprefix("window.exploreData = ")[:-2])
    assert [query["id"] for query in data["queries"]] == [0, 4, 8, 12, 16]
    assert [query["text"] for query in data["queries"]] == [TEXTS[place] for place in (0, 4, 8, 12, 16)]
    model, words = load_pretrained(str(directory / "run" / "checkpoint-8"))
    asked = TextData(directory / "train.jsonl", TextSettings.read(tmp_path / "bank"), model, words)
    source = sp.Source(sp.open(tmp_path / "bank"), model=model, progress=False)
    best = source.helpful(torch.utils.data.Subset(asked, [0, 4, 8, 12, 16]), 1)
    assert [lists["helpful"][0][0] for lists in data["lists"]] == best.indices[:, 0].tolist()
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for changed in (whole + lines[0], b"".join(reversed(lines))):  # as many lines are no proof
        file.write_bytes(changed)
        refused = call("explore", tmp_path / "bank", "--static", tmp_path / "other", code=2)
        assert "is no longer the file that" in refused
        assert "give queries by --dataset FILE" in refused
    file.unlink()
    said = call("explore", tmp_path / "bank", "--static", tmp_path / "other", code=2)
    assert "give --model and --queries, or --dataset FILE" in said
