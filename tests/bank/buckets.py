"""A server of S3 in this process, by moto, that can go wrong as networks do."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

BUCKET = "banks"
SETTINGS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTING",
    "AWS_SECRET_ACCESS_KEY": "verysecretvalue",
    "AWS_REGION": "us-east-1",
}

Answer = Iterable[bytes]
App = Callable[[dict[str, Any], Callable[..., Any]], Answer]


class Faulty:
    """A WSGI application whose requests are refused, lost, doubled, or answered to nobody.

    Args:
        app: what answers.
        share: of requests that meet a fault.
        seed: of the choice.
    """

    def __init__(self, app: App, share: float = 0.0, seed: int = 0) -> None:
        self._app = app
        self._draw = random.Random(seed)
        self._one_by_one = threading.Lock()  # moto looks whether a key is free and then writes; S3 does both at once
        self.share = share
        self.faults: Counter[str] = Counter()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        with self._one_by_one:
            fault = self._fault()
            if fault == "503":
                return unavailable(start_response)
            if fault == "request lost":
                return hung_up(environ)
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            answers = [self._answered(environ, body) for _ in range(2 if fault == "delivered twice" else 1)]
        if fault == "answer lost":
            return hung_up(environ)
        if fault == "slow":
            time.sleep(0.3)
        status, headers, content = answers[-1]
        start_response(status, headers)
        return [content]

    def _fault(self) -> str | None:
        if self._draw.random() >= self.share:
            return None
        fault = self._draw.choice(["503", "request lost", "answer lost", "delivered twice", "slow"])
        self.faults[fault] += 1
        return fault

    def _answered(self, environ: dict[str, Any], body: bytes) -> tuple[str, list[tuple[str, str]], bytes]:
        from io import BytesIO

        said: list[Any] = []
        answer = self._app({**environ, "wsgi.input": BytesIO(body)}, lambda *heads, **_: said.append(heads))
        content = b"".join(answer)
        return said[0][0], said[0][1], content


def unavailable(start_response: Callable[..., Any]) -> Answer:
    start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", "0")])
    return [b""]


def hung_up(environ: dict[str, Any]) -> Answer:
    """Close the connection: the client never hears of its request again."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionError("hung up")


@contextmanager
def bucket(share: float = 0.0, seed: int = 0) -> Iterator[tuple[Faulty, dict[str, str]]]:
    """Serve an empty bucket: what goes wrong, and the environment that leads there."""
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            """Say nothing."""

    logging.getLogger("werkzeug").disabled = True
    app = Faulty(DomainDispatcherApplication(create_backend_app), seed=seed)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    make_bucket(url)
    app.share = share
    try:
        yield app, {**SETTINGS, "AWS_ENDPOINT_URL": url}
    finally:
        app.share = 0.0
        server.shutdown()
        thread.join()
        server.server_close()


def client(url: str) -> Any:
    """Boto's, which reaches the objects without our store."""
    import boto3

    names = {"aws_access_key_id": "AKIATESTING", "aws_secret_access_key": "verysecretvalue"}
    return boto3.client("s3", endpoint_url=url, region_name="us-east-1", **names)


def make_bucket(url: str) -> None:
    client(url).create_bucket(Bucket=BUCKET)
