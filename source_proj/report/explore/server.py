"""The page's server: for this machine alone, and for reading alone."""

import json
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from source_proj._errors import SourceProjError, extra
from source_proj.report.explore.state import Explorer, Kind

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["HEADERS", "PAGE_FILES", "application", "page_file", "serve"]

PAGE_FILES = {
    "index.html": "text/html",
    "shared.css": "text/css",
    "explore.css": "text/css",
    "explore.js": "text/javascript",
    "list.js": "text/javascript",
    "detail.js": "text/javascript",
    "tray.js": "text/javascript",
}

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_LOCAL = ("127.0.0.1", "localhost", "[::1]")

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]


def page_file(name: str) -> bytes:
    """One of the files that the page is made of; the report's page has the same first rules."""
    folder = "templates" if name == "shared.css" else "explore/page"
    return files("source_proj.report").joinpath(folder, name).read_bytes()


def application(explorer: Explorer) -> App:
    """The ASGI application of the page. It answers GET and HEAD, to this machine's own names, and writes nothing.

    Raises:
        ImportError: without starlette (extra ``explore``).
    """
    with extra("explore"):
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.routing import Route

    answers: dict[str, Callable[[Request], Any]] = {
        "/api/facts": lambda _: explorer.facts(),
        "/api/cleaned": partial(_cleaned, explorer),
        "/api/tokens/{query:int}/{place:int}": partial(_tokens, explorer),
        "/api/{kind}": partial(_listed, explorer),
        "/api/{kind}/labels": lambda request: explorer.labels(_kind(request)),
        "/api/{kind}/{place:int}": partial(_example, explorer),
        "/api/{kind}/{place:int}/{sense}": partial(_strongest, explorer),
    }
    routes = [Route(path, _answered(answer)) for path, answer in answers.items()]
    return _guarded(Starlette(routes=[*routes, Route("/", _page), Route("/{name}", _page)]))


def _answered(answer: Callable[["Request"], Any]) -> Callable[["Request"], "Response"]:
    """An endpoint whose answer is JSON, errors included."""
    from starlette.responses import Response

    def respond(request: "Request") -> "Response":
        try:
            given, status = answer(request), 200
        except (ValueError, IndexError, SourceProjError) as error:
            given, status = {"error": " ".join(str(error).split())}, 404 if isinstance(error, IndexError) else 400
        except Exception as error:  # whatever a data set raises of an example, such as a picture that is gone
            given, status = {"error": " ".join(f"{type(error).__name__}: {error}".split())}, 500
        if isinstance(given, Response):
            return given
        return Response(json.dumps(given), status_code=status, media_type="application/json")

    return respond


def _page(request: "Request") -> "Response":
    from starlette.responses import Response

    name = request.path_params.get("name", "index.html")
    if name == "data.js":  # which a folder on disk has its data in
        return Response("", media_type="text/javascript")
    if name not in PAGE_FILES:
        return Response("there is no such page", status_code=404, media_type="text/plain")
    return Response(page_file(name), media_type=PAGE_FILES[name])


def _listed(explorer: Explorer, request: "Request") -> Any:
    asked = request.query_params
    stage = asked.get("stage", "")
    return explorer.listed(
        _kind(request),
        asked.get("words", ""),
        asked.get("label", ""),
        _number("stage", stage) if stage else None,
        _number("start", asked.get("start", 0)),
        _number("count", asked.get("count", 50)),
    )


def _example(explorer: Explorer, request: "Request") -> Any:
    return explorer.example(_kind(request), request.path_params["place"])


def _strongest(explorer: Explorer, request: "Request") -> Any:
    sense = _one_of(request.path_params["sense"], "helpful", "harmful")
    return explorer.strongest(
        _kind(request), request.path_params["place"], sense, _number("page", request.query_params.get("page", 0))
    )


def _tokens(explorer: Explorer, request: "Request") -> Any:
    return explorer.tokens(request.path_params["query"], request.path_params["place"])


def _cleaned(explorer: Explorer, request: "Request") -> Any:
    from starlette.responses import Response

    places = request.query_params.get("places", "")
    name, content = explorer.cleaned(_number("places", place) for place in places.split(",") if place)
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type="application/octet-stream", headers=headers)


def _number(name: str, text: str | int) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, got {text!r}") from None


def _kind(request: "Request") -> Kind:
    kind: Kind = _one_of(request.path_params["kind"], "queries", "train")
    return kind


def serve(explorer: Explorer, port: int = 0, ready: Callable[[str], None] = print) -> None:
    """Serve the page on this machine's loopback until interrupted.

    Args:
        explorer: what it shows.
        port: where; 0 takes a free one.
        ready: called with the page's address.

    Raises:
        ImportError: without uvicorn (extra ``explore``).
        OSError: the port is taken, or is not for everybody.
    """
    with extra("explore"):
        import uvicorn
    import socket

    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
        except OSError as error:
            reason = f"nothing can be served at port {port} ({error.strerror})"
            raise OSError(f"{reason}: give another, or 0 for any") from None
        config = uvicorn.Config(application(explorer), log_level="warning", server_header=False)
        ready(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[listening])


def _one_of(given: str, *known: str) -> Any:
    if given not in known:
        raise IndexError(f"there is no {given!r}, only {', '.join(known)}")
    return given


def _guarded(app: App) -> App:
    """Let through what reads, comes under a name of this machine, and from no other site's page."""

    async def guarded(scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        refused = _refusal(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        if refused is None:
            await app(scope, receive, send_with_headers)
            return
        status, words = refused
        head = {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]}
        await send_with_headers(head)
        await send({"type": "http.response.body", "body": words.encode()})

    return guarded


def _refusal(scope: Any) -> tuple[int, str] | None:
    """Status and reason where a request is refused."""
    if scope["method"] not in ("GET", "HEAD"):
        return 405, "this page is for reading alone"
    hosts = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
    port = (scope.get("server") or ("", None))[1]
    local = {name for own in _LOCAL for name in ([own, f"{own}:80"] if port == 80 else [f"{own}:{port}"])}
    if len(hosts) != 1 or hosts[0] not in local:  # a name that was pointed at this machine to read what it serves
        return 421, "this page answers to 127.0.0.1 and localhost alone"
    sites = [value for name, value in scope["headers"] if name == b"sec-fetch-site"]
    if scope["path"].startswith("/api/") and any(site not in (b"same-origin", b"none") for site in sites):
        return 403, "another site's page may not ask"
    return None
