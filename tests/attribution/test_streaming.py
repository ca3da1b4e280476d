"""Scores and hits streamed to the disk are those in memory, whole or not there, and a killed stream is gone on with."""

import shutil

import numpy as np
import pytest
import torch
import zarr
from problems import source

import source_proj as sp
from source_proj.attribution import attributor as verbs
from source_proj.attribution import streaming
from source_proj.attribution.hits_file import HitsFile


@pytest.fixture
def few_queries(monkeypatch):
    """Blocks of two queries, and narrow chunks."""
    monkeypatch.setattr(streaming, "_MOST_QUERIES", 2)
    monkeypatch.setattr(streaming, "_CHUNK", (2, 16))


def asked(blobs):
    problem, bank = blobs
    method = source(problem, bank, batch_size=2)
    return method, problem.queries


def test_streamed_scores_are_those_in_memory(blobs, tmp_path, few_queries):
    method, queries = asked(blobs)
    streamed, held = method.score(queries, out=tmp_path / "scores.zarr"), method.score(queries)
    blocks = [method.score(method.sketch(queries).part(start, start + 2)).values for start in range(0, 7, 2)]
    assert np.array_equal(streamed.values, np.concatenate(blocks))
    np.testing.assert_allclose(streamed.values, held.values, rtol=1e-4, atol=1e-7)
    assert (streamed.query_ids, streamed.train_ids, streamed.unit) == (held.query_ids, held.train_ids, held.unit)
    assert np.array_equal(streamed[3], streamed.values[3])
    assert streamed.top_k(3).ids == sp.Scores(streamed.values, *_ids(held), unit="u").top_k(3).ids
    removed = held.train_ids[:4]
    np.testing.assert_allclose(
        streamed.predict_removal(removed).values, held.predict_removal(removed).values, rtol=1e-3
    )
    assert {path.name for path in tmp_path.iterdir()} == {"scores.zarr"}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        method.score(queries, out=tmp_path / "scores.zarr")


def _ids(scores):
    return scores.query_ids, scores.train_ids


@pytest.mark.parametrize("ending", [".parquet", ".zarr"])
def test_streamed_hits_are_those_in_memory(blobs, tmp_path, few_queries, ending):
    method, queries = asked(blobs)
    features = method.sketch(queries, ids=[f"q{i}" for i in range(7)])
    hits = method.top_k(features, 5, out=tmp_path / f"hits{ending}")
    held = [hit for start in range(0, 7, 2) for hit in method.top_k(features.part(start, start + 2), 5)]
    assert len(hits) == 7
    assert list(hits) == held
    assert [hits[place] for place in (6, 0, -3)] == [held[place][1] for place in (6, 0, 4)]
    table = hits.to_pandas()
    assert list(table.columns) == ["query_id", "train_id", "rank", "score"]
    assert table["rank"].tolist() == [1, 2, 3, 4, 5] * 7


@pytest.mark.parametrize("verb", ["bottom_k", "helpful", "harmful"])
def test_every_list_is_streamed_by_its_own_sense(blobs, tmp_path, few_queries, verb):
    method, queries = asked(blobs)
    features = method.sketch(queries)
    list_of = getattr(method, verb)
    hits = list_of(features, 4, out=tmp_path / "hits.parquet")
    assert list(hits) == [hit for start in range(0, 7, 2) for hit in list_of(features.part(start, start + 2), 4)]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        list_of(features, 4, out=tmp_path / "hits.parquet")
    assert len(list_of(features, 3, out=tmp_path / "hits.parquet", overwrite=True)[0]) == 3


@pytest.mark.parametrize("given", ["labelled", "unlabelled", "features"])
@pytest.mark.parametrize("query_gradient", ["final", "mean"])
def test_one_bar_counts_the_queries_of_all_blocks(blobs, tmp_path, few_queries, given, query_gradient):
    problem, bank = blobs
    told = []
    method = source(
        problem, bank, batch_size=1, query_gradient=query_gradient, progress=lambda *step: told.append(step)
    ).fit()
    inputs = problem.queries.tensors[0]
    queries = {"labelled": problem.queries, "unlabelled": inputs, "features": method.sketch(problem.queries)}[given]
    for verb in (
        lambda: method.score(queries, out=tmp_path / "s.zarr"),
        lambda: method.top_k(queries, 3, tmp_path / "h.zarr"),
    ):
        told.clear()
        verb()
        assert {(description, total) for description, _, total in told} == {("queries", 7)}
        counts = [done for _, done, _ in told]
        assert counts == sorted(set(counts))
        assert counts[-1] == 7
        if given == "features" or query_gradient == "final":
            assert {2, 4, 6} <= set(counts)


@pytest.mark.parametrize("sizes", [(5, 10), (1, 1), (100,)])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_block_moves_the_bar_while_it_is_passed_over(sizes, passes):
    told = []
    blocks = streaming.QueryBlocks(sum(sizes), max(sizes), passes, lambda span, progress: progress)
    for made, progress in enumerate(streaming._features(blocks, lambda *step: told.append(step[1]))):
        size = min(max(sizes), sum(sizes) - made * max(sizes))
        for _ in range(passes):
            for done in range(1, size + 1):
                progress("queries", done, size)
        told_at = told[-1] if told else 0
        assert told_at == made * max(sizes) + passes * size // (passes + 1)
        progress("queries", 1, size)  # a pass more than was known
        assert (told[-1] if told else 0) == told_at
    assert told[-1] == sum(sizes)


def test_a_killed_stream_goes_on(blobs, tmp_path, few_queries, monkeypatch):
    method, queries = asked(blobs)
    method.score(queries, out=tmp_path / "whole.zarr")
    made, blocks = [], verbs.Attributor.blocks

    def dying(self, terms, count, *, limit):
        if len(made) == limit:
            raise KeyboardInterrupt
        made.append(count)
        return blocks(self, terms, count)

    monkeypatch.setattr(verbs.Attributor, "blocks", lambda *given: dying(*given, limit=2))
    with pytest.raises(KeyboardInterrupt):
        method.score(queries, out=tmp_path / "scores.zarr")
    assert not (tmp_path / "scores.zarr").exists()
    monkeypatch.setattr(verbs.Attributor, "blocks", lambda *given: dying(*given, limit=99))
    scores = method.score(queries, out=tmp_path / "scores.zarr")
    assert made == [2, 2, 2, 1]  # what was committed was not made again
    assert np.array_equal(scores.values, method_values(tmp_path / "whole.zarr"))


def test_another_querys_block_is_made_anew(blobs, tmp_path, few_queries, monkeypatch):
    method, queries = asked(blobs)
    with monkeypatch.context() as patched:
        patched.setattr(streaming, "name_folder", lambda *given, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            method.score(queries, out=tmp_path / "scores.zarr")
    x, y = queries.tensors
    other = torch.utils.data.TensorDataset(torch.cat([x[:4], x[4:] + 1]), y)
    scores = method.score(other, out=tmp_path / "scores.zarr")
    np.testing.assert_allclose(scores.values, method.score(other).values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("what", ["scores", "hits"])
def test_what_zarr_was_about_to_rename_is_not_in_the_output(blobs, tmp_path, few_queries, monkeypatch, what):
    method, queries = asked(blobs)
    path = tmp_path / f"{what}.zarr"

    def ask(**options):
        if what == "scores":
            return method.score(queries, out=path, **options)
        return method.top_k(queries, 3, out=path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "name_folder", lambda *given, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ask()
    for inner in [tmp_path / f".{what}.zarr.unfinished/content", *tmp_path.rglob("c/0")]:
        (inner / "zarr.0123456789abcdef.partial").write_bytes(b"{")
    ask()
    assert not list(tmp_path.rglob("*.partial"))
    ask(overwrite=True)


def method_values(path):
    import zarr

    return zarr.open_array(path, mode="r")[...]


def test_saved_features_serve_as_queries(blobs, tmp_path):
    method, queries = asked(blobs)
    features = method.sketch(queries, ids=[("a", i) for i in range(7)])
    features.save(tmp_path / "features.safetensors")
    loaded = sp.QueryFeatures.load(tmp_path / "features.safetensors")
    assert loaded.ids == features.ids
    assert np.array_equal(method.score(loaded).values, method.score(queries).values)
    other = problem_with_another_sketch(blobs, tmp_path)
    with pytest.raises(sp.MismatchError, match="do not fit the bank's"):
        other.score(loaded)
    content = bytearray((tmp_path / "features.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "features.safetensors").write_bytes(content)
    with pytest.raises(sp.MismatchError, match="damaged"):
        sp.QueryFeatures.load(tmp_path / "features.safetensors")


def problem_with_another_sketch(blobs, tmp_path):
    problem, _ = blobs
    return source(problem, problem.build(tmp_path / "other", sketch=sp.Sketch(16)))


def test_weights_are_loaded_once(blobs, monkeypatch):
    method, queries = asked(blobs)
    loads, load = [], sp.Checkpoint.load_into
    monkeypatch.setattr(sp.Checkpoint, "load_into", lambda self, model: (loads.append(self), load(self, model)))
    first = method.score(queries).values
    count = len(loads)
    assert count
    assert np.array_equal(method.score(queries).values, first)
    assert len(loads) == count
    with torch.no_grad():
        method.model[0].weight += 0  # somebody is at work on it
    assert np.array_equal(method.score(queries).values, first)
    assert len(loads) == 2 * count


def test_scores_in_long_form(tmp_path):
    import pandas as pd

    values = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    sp.Scores(values, ["a", "b", "c"], [("s", i) for i in range(4)], unit="u").to_parquet(tmp_path / "scores.parquet")
    table = pd.read_parquet(tmp_path / "scores.parquet")
    assert list(table.columns) == ["query_id", "train_id", "rank", "score"]
    for query, row in zip("abc", values, strict=True):
        own = table[table.query_id == query]
        assert own.score.tolist() == sorted(row.tolist(), reverse=True)
        assert own.train_id.tolist() == [f"s/{i}" for i in np.argsort(-row)]


@pytest.fixture
def streamed_hits(blobs, tmp_path, few_queries):
    method, queries = asked(blobs)
    return method.top_k(queries, 5, out=tmp_path / "hits.zarr").path


@pytest.mark.parametrize("name", ["zarr.json", "indices/zarr.json", "indices/c/1/0", "scores/c/1/0"])
@pytest.mark.parametrize("change", ["lost", "emptied", "cut", "flipped", "exchanged"])
def test_damaged_hits_are_refused_by_name(streamed_hits, name, change):
    """A chunk that was lost gave the first example of the training set, with a score of 0."""
    file = streamed_hits / name
    content, other = file.read_bytes(), (file.parent.parent / "0/0" if "/c/" in name else streamed_hits / "zarr.json")
    if change == "lost":
        file.unlink()
    elif change == "exchanged":
        shutil.copy(streamed_hits / "scores/zarr.json" if other == file else other, file)
    else:
        place = content.find(b"shape") if name != "zarr.json" else content.find(b"true")
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        file.write_bytes({"emptied": b"", "cut": content[:-2], "flipped": flipped}[change])
    with pytest.raises(sp.SourceProjError, match="hits") as refused:
        list(HitsFile(streamed_hits))
    assert str(streamed_hits) in str(refused.value)


def test_a_lost_chunk_of_scores_is_no_zeros(blobs, tmp_path, few_queries):
    method, queries = asked(blobs)
    held = method.score(queries)
    held.to_zarr(tmp_path / "held.zarr")
    method.score(queries, out=tmp_path / "streamed.zarr")
    for path in (tmp_path / "held.zarr", tmp_path / "streamed.zarr"):
        next(file for file in sorted(path.rglob("0")) if file.is_file()).unlink()
        assert np.isnan(zarr.open_array(path, mode="r")[0, 0])
    changed = next(file for file in sorted((tmp_path / "streamed.zarr/c").rglob("*")) if file.is_file())
    changed.write_bytes(changed.read_bytes()[:-5] + b"\0" + changed.read_bytes()[-4:])
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(tmp_path / "streamed.zarr", mode="r")[...]
