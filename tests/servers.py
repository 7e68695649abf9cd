"""A local server whose answers a test writes itself, faults and all."""

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Callable, Mapping
from typing import Any, Self

Answer = Callable[["Handler", bytes, int], object]  # of the request, with the file and where in it to begin


class Server(http.server.ThreadingHTTPServer):
    """Sends files by their paths; before that, the `answers` of a path, one a request."""

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.url = f"{self.address}/file.bin"
        self.files = dict(files)
        self.etags = {path: hashlib.md5(content).hexdigest() for path, content in files.items()}  # what is stated
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[tuple[str, int]] = []  # path and place in the file of each request
        self.tokens: list[str | None] = []  # what each showed as authorisation
        self.over = threading.Event()

    def starts(self, path: str = "/file.bin") -> list[int]:
        return [start for name, start in self.asked if name == path]

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.server.asked.append((self.path, start))
        self.server.tokens.append(self.headers["Authorization"])
        answers = self.server.answers.get(self.path)
        answer = answers.pop(0) if answers else well if self.path in self.server.files else status(404)
        with contextlib.suppress(OSError):  # the reader has gone
            answer(self, self.server.files.get(self.path, b""), start)

    do_HEAD = do_GET  # noqa: N815

    def head(self, status: int, length: int | None) -> None:
        """Status and headers."""
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{self.server.etags.get(self.path, "")}"')
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


def well(request: Handler, content: bytes, start: int) -> None:
    """As a good server does."""
    request.head(206 if start < len(content) else 416, len(content) - start)
    request.wfile.write(content[start:])


def cut(after: int) -> Answer:
    """The connection breaks after so many bytes."""

    def answer(request: Handler, content: bytes, start: int) -> None:
        request.head(206, len(content) - start)
        request.wfile.write(content[start : start + after])

    return answer


def status(code: int) -> Answer:
    return lambda request, _content, _start: request.send_error(code)


def serve(content: bytes, *answers: Answer) -> Server:
    """A server of one file, `/file.bin`."""
    server = Server({"/file.bin": content})
    server.answers["/file.bin"] = list(answers)
    return server
