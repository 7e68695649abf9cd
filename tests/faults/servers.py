"""A server whose answers a test writes itself, faults and all."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator
from typing import Any

Answer = Callable[["Handler", bytes, int], object]  # of the request, with the file and where in it to begin


class Server(http.server.ThreadingHTTPServer):
    """Answers each request by the next of ``answers``, and well when there is none left.

    Attributes:
        starts: the place in the file that each request asked for.
        tokens: what each request showed as authorisation.
    """

    daemon_threads = True

    def __init__(self, content: bytes, answers: list[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.answers = content, answers
        self.starts: list[int] = []
        self.tokens: list[str | None] = []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.server.starts.append(start)
        self.server.tokens.append(self.headers["Authorization"])
        answer = self.server.answers.pop(0) if self.server.answers else well
        with contextlib.suppress(OSError):  # the reader has gone
            answer(self, self.server.content, start)

    do_HEAD = do_GET  # noqa: N815

    def head(self, status: int, length: int | None) -> None:
        """Status and headers."""
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


def well(request: Handler, content: bytes, start: int) -> None:
    """As a good server does."""
    request.head(206 if start < len(content) else 416, len(content) - start)
    request.wfile.write(content[start:])


@contextlib.contextmanager
def serve(content: bytes, *answers: Answer) -> Iterator[Server]:
    """A running server of one file."""
    with Server(content, list(answers)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
