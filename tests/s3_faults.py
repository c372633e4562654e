"""An S3 server in this process that does what it is told not to do well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any
from urllib.parse import parse_qs

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
from werkzeug.test import run_wsgi_app


@dataclass(frozen=True)
class Request:
    """What a client asks for; ``environ`` is WSGI's, to look at and to change."""

    environ: dict[str, Any]

    @property
    def method(self) -> str:
        return str(self.environ["REQUEST_METHOD"])

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(self.environ["QUERY_STRING"], keep_blank_values=True)

    @property
    def size(self) -> int:
        return int(self.environ.get("CONTENT_LENGTH") or 0)

    def has(self, header: str) -> bool:
        return f"HTTP_{header.upper().replace('-', '_')}" in self.environ


@dataclass(frozen=True)
class Refusal:
    """An answer in place of the server's."""

    status: str
    code: str


class Cut:
    """The server's answer, whose body breaks off half way."""


Fault = Callable[[Request], Refusal | Cut | None]
DENIED = Refusal("403 Forbidden", "AccessDenied")


@dataclass
class FaultyS3:
    """``fault`` looks at every request first; ``asked`` counts them all, by what they want."""

    endpoint: str
    fault: Fault = lambda _: None
    asked: list[Request] = field(default_factory=list)


@contextmanager
def faulty_s3() -> Iterator[FaultyS3]:
    """A server with nothing in it, and no faults yet."""
    application = DomainDispatcherApplication(create_backend_app)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        served.asked.append(request)
        fault = served.fault(request)
        if isinstance(fault, Refusal):
            body = f"<Error><Code>{fault.code}</Code><Message>as it was told to</Message></Error>".encode()
            environ["wsgi.input"].read(request.size)
            start_response(fault.status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [] if request.method == "HEAD" else [body]
        if isinstance(fault, Cut):
            parts, status, headers = run_wsgi_app(application, environ)
            whole = b"".join(parts)
            start_response(status, list(headers))
            return [whole[: len(whole) // 2]]
        return application(environ, start_response)

    server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=MotoRequestHandler)
    served = FaultyS3(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
