"""The examples with models of transformers, small and on made-up texts."""

import argparse
import gzip
import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import source_proj as sp

for extra in ("transformers", "accelerate"):
    pytest.importorskip(extra, reason=f"needs {extra}: install source-proj[hf]")
for extra in ("jinja2", "PIL", "matplotlib"):
    pytest.importorskip(extra, reason=f"needs {extra}: install source-proj[demo,plot]")

EXAMPLES = Path(__file__).parents[2] / "examples"
FILLERS = ["the", "a", "film", "plot", "with", "and", "of", "cast", "music", "story", "that", "is", "so", "very"]
OPINIONS = (["bad", "dull", "awful"], ["good", "fine", "superb"])


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    for folder in (EXAMPLES, EXAMPLES / "paper"):
        monkeypatch.syspath_prepend(str(folder))


def made_up_reviews(count, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    return [(" ".join([*rng.choice(FILLERS, 9), rng.choice(OPINIONS[label]), "<b>"]), int(label)) for label in labels]


@pytest.fixture
def small_bert(tmp_path):
    """A random BERT of three layers, and a tokenizer of whole words, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *FILLERS, *OPINIONS[0], *OPINIONS[1]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_sentences_are_attributed_and_the_claim_is_checked(small_bert, tmp_path, monkeypatch, capsys):
    import sst2_trainer

    made = {"train": made_up_reviews(96, 0), "dev": made_up_reviews(24, 1)}
    monkeypatch.setattr(sst2_trainer, "load_sentences", lambda _, split: made[split])
    page = tmp_path / "page.html"
    arguments = ["--model", small_bert, "--sentences", 96, "--reviews", 24, "--dim", 512, "--removed", 24]
    monkeypatch.setattr("sys.argv", ["sst2_trainer.py", *map(str, arguments), "--lr", "3e-3", "--page", str(page)])
    sst2_trainer.main()
    said = capsys.readouterr().out
    assert said.count("fine-tuning again") == 1
    assert said.count("its margin was predicted to change by") == 4
    assert "holds:" in said
    content = page.read_text()
    assert content.count("Without its 24 most") == 4
    assert "&lt;b&gt;" in content
    assert "<b>" not in content.replace("<b>Positive: helpful.</b>", "")


def test_ignored_sentences_leave_the_loss(small_bert):
    import sst2_trainer
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    reviews = sst2_trainer.Reviews(made_up_reviews(6, 0), AutoTokenizer.from_pretrained(small_bert))
    model = AutoModelForSequenceClassification.from_pretrained(small_bert, num_labels=2).eval()
    without = reviews.without([1, 4])
    assert ignored(reviews) == 0
    assert ignored(without) == 2
    rest = torch.tensor([0, 2, 3, 5])
    with torch.no_grad():
        found = model(**without.rows).loss
        expected = model(**{name: rows[rest] for name, rows in reviews.rows.items()}).loss
    torch.testing.assert_close(found, expected)


def ignored(reviews):
    return int((reviews.rows["labels"] == -100).sum())


def test_a_removal_holds_by_sign_and_order():
    from sst2_trainer import Removal

    changes = np.linspace(-1.0, 1.0, 20)
    assert Removal(0, "helpful", changes, 3 * changes).holds
    assert not Removal(0, "helpful", changes, -changes).holds
    shuffled = np.concatenate([changes[:1], np.random.default_rng(0).permutation(changes[1:])])
    assert abs(Removal(0, "helpful", changes, shuffled).agreement) < 0.5
    own = changes.copy()
    own[0] = 0.01
    assert Removal(0, "helpful", changes, own).agreement > 0.7
    assert not Removal(0, "helpful", changes, own).holds  # its own margin moved the other way


def made_up_play(scenes=6, lines=60):
    """Scenes that go round in some words of their own, so that what is near is what teaches."""
    rng = np.random.default_rng(0)
    parts = []
    for scene in range(scenes):
        words = [f"{''.join(rng.choice(list('bcdfglmnprst'), 2))}{'aeiou'[i % 5]}{scene}" for i in range(8)] * 2
        parts += [" ".join(["<i>", *words[line % 8 :][:4]]) + "\n" for line in range(lines)]
    return "".join(parts)


def test_tokens_are_attributed_both_ways(tmp_path, monkeypatch, capsys):
    import shakespeare_tokens

    monkeypatch.setattr(shakespeare_tokens, "load_shakespeare", lambda _: made_up_play())
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    monkeypatch.setattr(shakespeare_tokens, "NEAR", 8)
    sizes = {"stretches": 120, "passages": 8, "shown": 2, "tokens": 24, "vocabulary": 300, "epochs": 12, "dim": 512}
    arguments = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    monkeypatch.setattr(
        "sys.argv", ["shakespeare_tokens.py", *arguments, "--page", str(page), "--picture", str(picture)]
    )
    shakespeare_tokens.main()
    said = capsys.readouterr().out
    assert "token scores sum to their passage's score" in said
    content = page.read_text()
    assert content.count('class="tokens"') == 4
    assert content.count('nats">') > 40
    assert "<i>" not in content
    assert "&lt;i&gt;" in content
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_claims_about_tokens_are_checked():
    import shakespeare_tokens

    import source_proj as sp

    texts = [{"labels": torch.arange(4)} for _ in range(3)]
    queries = sp.TokenQueries(texts, shakespeare_tokens.TASK)
    by_token = np.random.default_rng(0).normal(size=(9, 50))
    whole = by_token.reshape(3, 3, 50).sum(1)
    shakespeare_tokens.check_sums(queries, by_token, whole)
    with pytest.raises(SystemExit, match="do not sum"):
        shakespeare_tokens.check_sums(queries, by_token, whole[::-1])

    places, kept = np.array([10, 100, 200, 300]), np.arange(400)
    distance = -np.abs(places[:, None] - kept).astype(float)
    shakespeare_tokens.check_surroundings(distance, places, kept)
    with pytest.raises(SystemExit, match="no higher"):
        shakespeare_tokens.check_surroundings(np.random.default_rng(0).normal(size=(4, 400)), places, kept)


def test_stretches_are_whole_lines_in_order():
    from shakespeare_tokens import cut, train_tokenizer

    text = made_up_play(2, 20)
    tokenizer = train_tokenizer(text, 300)
    stretches = cut(text, tokenizer, 30)
    assert "".join(tokenizer.decode(one.tokens) for one in stretches) == text
    assert max(len(one.tokens) for one in stretches) <= 30
    lines = text.splitlines(keepends=True)
    for one in stretches:
        assert tokenizer.decode(one.tokens).startswith(lines[one.line - 1])


def test_sentences_come_out_of_their_archive_once(tmp_path, monkeypatch):
    import _data

    content = b"sentence\tlabel\nit 's fine \t1\ndull\t0\n"
    archive = tmp_path / "SST-2.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("SST-2/train.tsv", content)
    monkeypatch.setitem(_data.SOURCES, "glue_sst2", archive.as_uri())
    with pytest.raises(ValueError, match=r"not the known glue_sst2/train\.tsv"):
        _data.load_sentences(tmp_path / "data", "train")
    assert not (tmp_path / "data").exists()
    monkeypatch.setitem(_data.SHA256, "glue_sst2/train.tsv", hashlib.sha256(content).hexdigest())
    expected = [("it 's fine", 1), ("dull", 0)]
    assert _data.load_sentences(tmp_path / "data", "train") == expected
    assert gzip.decompress((tmp_path / "data" / "glue_sst2" / "train.tsv.gz").read_bytes()) == content
    archive.unlink()
    assert _data.load_sentences(tmp_path / "data", "train") == expected


def test_gpt2_is_told_apart_by_its_weights(tmp_path, monkeypatch):
    """The setting of --full, with a tiny GPT-2 of the same class and two splits of a few lines."""
    import transformers
    import wikitext2

    datasets = pytest.importorskip("datasets", reason="needs datasets: install source-proj[datasets]")

    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "weights")
    lines = [" ".join(str(number) for number in range(start, start + 20)) for start in range(20)]
    splits = {split: datasets.Dataset.from_dict({"text": lines}) for split in ("train", "validation")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: splits)

    class Numbers:
        def __call__(self, text):
            return {"input_ids": [int(word) for word in text.split()]}

        def decode(self, ids):
            return " ".join(str(int(number)) for number in ids)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_: Numbers())
    monkeypatch.setattr("_gpt2.TOKENS", 16)
    options = argparse.Namespace(full=True, quick=False, device="cpu", weights=str(tmp_path / "weights"))
    setting = wikitext2.gpt2(options)
    assert len(setting.training.rows) == len(lines) * 20 // 16
    assert setting.show("queries", 1)[0].split()[:4] == ["16", "17", "18", "19"]
    assert setting.settings["weights"] == str(tmp_path / "weights")
    short = replace(setting.training, recipe=replace(setting.training.recipe, epochs=1))
    bank = sp.build(
        short.make_model(), short.task, short.record(0, tmp_path / "run"), short.rows, tmp_path / "bank",
        sketch=sp.Sketch(32), progress=False,
    )  # fmt: skip
    scores = sp.Source(bank, model=short.make_model(), progress=False).score(short.queries)
    assert np.isfinite(np.asarray(scores)).all()
