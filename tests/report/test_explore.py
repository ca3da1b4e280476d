"""The page's answers are the engine's own, they are for this machine alone, and strange texts stay texts."""

import json
import socket
from urllib.parse import quote

import numpy as np
import pytest
from explored import HOSTILE, Client, make_explorer

from source_proj._io.printable import printable
from source_proj.report.explore import serve, write_static
from source_proj.report.explore.state import PAGE

pytest.importorskip("starlette", reason="the extra explore is not installed")


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore")
    (folder / "train.jsonl").write_text("".join(f'{{"text": {place}}}\n' for place in range(48)))
    return make_explorer(folder, file=folder / "train.jsonl")


@pytest.fixture(scope="module")
def client(explorer):
    return Client(explorer)


@pytest.fixture(scope="module")
def parts(explorer):
    return explorer.method.by_segment(explorer._features)


def everything(client, path):
    hits, page, more = [], 0, True
    while more:
        answer = client.json(f"{path}?page={page}")
        hits, more, page = hits + answer["hits"], answer["more"], page + 1
    return hits


@pytest.mark.parametrize(("sense", "sign"), [("helpful", 1), ("harmful", -1)])
def test_the_lists_of_a_query_and_of_an_example_are_rows_and_columns_of_the_scores(client, parts, sense, sign):
    scores = parts.total().values
    assert scores.shape[1] > PAGE  # so that going on is tried
    for kind, count, values in (("queries", 12, scores), ("train", 48, scores.T)):
        for place in range(0, count, 5):
            hits = everything(client, f"/api/{kind}/{place}/{sense}")
            row = values[place] * sign
            assert len(hits) == (row > 0).sum()
            places = [hit["example"]["place"] for hit in hits]
            np.testing.assert_allclose([hit["score"] * sign for hit in hits], row[places], rtol=1e-4, atol=1e-6)
            assert np.all(np.diff([abs(hit["score"]) for hit in hits]) <= 0)
            own = parts.values[:, place, places] if kind == "queries" else parts.values[:, places, place]
            np.testing.assert_allclose(np.array([hit["parts"] for hit in hits]), own.T, rtol=1e-4, atol=1e-6)


def test_a_search_finds_what_a_reader_would(client, explorer):
    shown = [explorer.example("train", place) for place in range(48)]
    words = [f"{example['word']} {example['label']} {example['text']}".lower() for example in shown]
    for word in ("FINE", "number 1", "=id4", "onerror", "absent"):
        found = client.json(f"/api/train?words={word.replace(' ', '%20')}&count=200")
        wanted = [place for place, text in enumerate(words) if all(part in text for part in word.lower().split())]
        assert [example["place"] for example in found["examples"]] == wanted
        assert found["total"] == len(wanted)
    of_label = client.json("/api/train?label=bad&count=200")["examples"]
    assert [example["place"] for example in of_label] == [p for p in range(48) if shown[p]["label"] == "bad"]
    assert client.json("/api/train?stage=0&start=40&count=200")["total"] == 48
    assert client.json("/api/train?stage=1")["total"] == 0


@pytest.mark.parametrize(
    ("path", "status"),
    [("/api/train/48", 404), ("/api/other", 404), ("/api/train/1/best", 404), ("/api/train?start=-1", 400),
     ("/api/train?count=100000", 400), ("/api/queries/0/helpful?page=99", 404), ("/api/queries/0/helpful?page=x", 400),
     ("/../pyproject.toml", 404), ("/state.py", 404), ("/api/tokens/0/0", 400), ("/api/cleaned?places=99", 400)],
)  # fmt: skip
def test_what_is_not_there_is_refused(client, path, status):
    assert client.ask(path)[0] == status


@pytest.mark.parametrize("error", [KeyError("gone"), OSError("gone"), RuntimeError("gone")])
def test_what_a_data_set_raises_is_told_to_the_page(client, explorer, monkeypatch, error):
    """The page reads JSON, and said that "Internal Server Error" is none."""

    def show(*_):
        raise error

    monkeypatch.setattr(type(explorer._index["train"].examples), "show", show)
    status, headers, body = client.ask("/api/train/1")
    assert (status, headers["content-type"]) == (500, "application/json")
    assert json.loads(body)["error"].startswith(f"{type(error).__name__}: ")
    assert "gone" in json.loads(body)["error"]


@pytest.mark.parametrize("name", ["start", "count", "stage"])
def test_what_is_no_number_is_named(client, name):
    status, *_, body = client.ask(f"/api/train?{name}=abc")
    assert status == 400
    assert f"{name} must be a whole number, got 'abc'" in json.loads(body)["error"]


@pytest.mark.parametrize(
    "host", [None, "evil.example", "evil.example:8000", "127.0.0.1", "127.0.0.1:8001", "localhost.evil:8000"]
)
def test_another_host_name_is_refused(client, host):
    assert client.ask("/api/facts", host=host)[0] == 421


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "LOCALHOST:8000", "[::1]:8000"])
def test_this_machines_names_are_answered(client, host):
    assert client.ask("/api/facts", host=host)[0] == 200


def test_other_sites_may_not_ask_and_nobody_may_write(client):
    assert client.ask("/api/facts", sec_fetch_site="cross-site")[0] == 403
    assert client.ask("/api/facts", sec_fetch_site="same-origin")[0] == 200
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert client.ask("/api/facts", method=method)[0] == 405


@pytest.mark.parametrize("path", ["/", "/explore.js", "/api/facts", "/api/train/99", "/absent"])
def test_every_answer_carries_the_policy(client, path):
    _, headers, _ = client.ask(path)
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "access-control-allow-origin" not in headers


def test_strange_texts_reach_the_page_as_escapes(client):
    _, _, body = client.ask("/api/train?count=200")
    examples = json.loads(body)["examples"]
    shown = [value for example in examples for name, value in example.items() if name != "id"]  # exported as it is
    assert not {"\x1b", "\u202e"} & set("".join(map(str, shown)))
    assert (
        client.json("/api/train?label=" + quote(next(e["label"] for e in examples if e["label"] != "bad")))["total"] > 0
    )
    assert printable(HOSTILE) in examples[0]["text"]
    assert examples[1]["cell"] == "'=id1"


def test_a_cleaned_file_lacks_the_chosen_records_alone(client, explorer):
    before = explorer.file.read_bytes()
    status, headers, body = client.ask("/api/cleaned?places=1,5")
    lines = before.splitlines(keepends=True)
    assert status == 200
    assert body == b"".join(line for place, line in enumerate(lines) if place not in (1, 5))
    assert "attachment" in headers["content-disposition"]
    assert explorer.file.read_bytes() == before


def test_a_folder_holds_the_first_lists_and_is_not_replaced_unasked(explorer, tmp_path):
    write_static(explorer, tmp_path / "page")
    with pytest.raises(FileExistsError):
        write_static(explorer, tmp_path / "page")
    content = (tmp_path / "page" / "data.js").read_text()
    data = json.loads(content.removeprefix("window.exploreData = ").removesuffix(";\n"))
    hits = explorer.strongest("queries", 3, "helpful")["hits"]
    assert [entry[0] for entry in data["lists"][3]["helpful"]] == [hit["example"]["place"] for hit in hits]


def test_some_rows_scores_are_those_of_all(explorer, parts):
    rows = [40, 3, 3, 17]
    scores = explorer.method.score(explorer._features).values
    np.testing.assert_allclose(explorer.method.score_rows(explorer._features, rows), scores[:, rows], rtol=1e-5)
    some = explorer.method.by_segment(explorer._features, rows)
    np.testing.assert_allclose(some.values, parts.values[:, :, rows], rtol=1e-5, atol=1e-7)
    assert np.array_equal(some.present, parts.present[:, rows])
    with pytest.raises(ValueError, match=r"0\.\.47, got \[48\]"):
        explorer.method.score_rows(explorer._features, [48])


def test_a_port_that_is_taken_is_named(explorer):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"nothing can be served at port {port} .*: give another, or 0 for any"):
            serve(explorer, port)
