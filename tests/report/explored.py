"""A small bank of pictures' like and texts to look around in, and how its page is asked without a socket."""

import asyncio
import json

import torch
from torch import nn

import source_proj as sp
from source_proj.bank.examples import Examples
from source_proj.report.explore import Explorer, application

HOSTILE = '<img src=x onerror="window.owned=1"></script>\u202e\x1b[2J'


class Words:
    """A data set that knows its texts; some of them want to be more than that."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], self.labels[index]

    def words(self, index):
        return f"film number {index} {HOSTILE if index % 7 == 0 else 'was fine'}", int(self.labels[index])


def make_explorer(folder, file=None, ids=None):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 4, generator=generator)
    labels = (inputs[:, 0] + 0.5 * inputs[:, 1] > 0).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    recorder = sp.Recorder(model, optimizer, folder / "run", every=10)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[:48]), labels[:48]).backward()
        optimizer.step()
        recorder.step()
    train, queries = Words(inputs[:48], labels[:48]), Words(inputs[48:], labels[48:])
    record = sp.Trajectory.from_recorder(folder / "run", segments=[[0], [1, 2]])
    bank = sp.build(
        model,
        sp.Classification(),
        record,
        train,
        folder / "bank",
        sketch=sp.Sketch(dim=32),
        ids=ids or [f"{HOSTILE}{place}" if place == 3 else f"=id{place}" for place in range(48)],
        progress=False,
    )
    bank.examples = Examples(train, class_names=["bad", HOSTILE])
    return Explorer(sp.Source(bank, model=model, progress=False), queries, file=file)


class Client:
    """Asks the application as a browser on this machine does."""

    def __init__(self, explorer):
        self.app = application(explorer)

    def ask(self, path, method="GET", host="127.0.0.1:8000", **headers):
        """Status, headers and body of an answer."""
        path, _, query = path.partition("?")
        named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "scheme": "http",
            "headers": [*([] if host is None else [(b"host", host.encode())]), *named],
            "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        sent = []

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        asyncio.run(self.app(scope, receive, send))
        answered = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], answered, b"".join(message.get("body", b"") for message in sent[1:])

    def json(self, path):
        status, _, body = self.ask(path)
        assert status == 200, body
        return json.loads(body)
