"""Servers that stall, lie about lengths or talk nonsense: the right file in the end, or one line and no file."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Answer, Handler, Server, serve

from samantics.data import downloads
from samantics.errors import StudyError
from samantics.models.weights import WeightFile, download

CONTENT = hashlib.shake_256(b"weights").digest(300_000)
HASH = hashlib.sha256(CONTENT).hexdigest()


STALL = 20.0  # seconds


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody waits until a server that stalls has done so."""
    monkeypatch.setattr(downloads, "WAIT", 0.01)
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    began = time.monotonic()
    yield
    assert time.monotonic() - began < STALL


def known(server: Server, sha256: str = HASH) -> WeightFile:
    return WeightFile("file.bin", server.url, sha256, 1, "none")


def stalls_halfway(request: Handler, content: bytes, start: int) -> None:
    request.head(206, len(content) - start)
    request.wfile.write(content[start : start + 100_000])
    request.server.over.wait(STALL)


def says_nothing(request: Handler, content: bytes, start: int) -> None:
    request.server.over.wait(STALL)


def drips(request: Handler, content: bytes, start: int) -> None:
    """Slowly, but never so slowly that it seems to have stopped."""
    request.head(206, len(content) - start)
    for place in range(start, len(content), 20_000):
        request.wfile.write(content[place : place + 20_000])
        request.server.over.wait(0.05)


def more_than_said(request: Handler, content: bytes, start: int) -> None:
    request.head(206, len(content) - start)
    request.wfile.write(content[start:] + b"and more")


def less_than_there_is(request: Handler, content: bytes, start: int) -> None:
    request.head(206, 1000)
    request.wfile.write(content[start : start + 1000])


def no_length(request: Handler, content: bytes, start: int) -> None:
    request.head(206, None)
    request.wfile.write(content[start:])


def chunks_break_off(request: Handler, content: bytes, start: int) -> None:
    request.protocol_version = "HTTP/1.1"
    request.send_response(206)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"%x\r\n" % 50_000 + content[start : start + 50_000] + b"\r\n")
    request.wfile.write(b"%x\r\n" % 50_000 + content[start + 50_000 : start + 60_000])


def no_http(request: Handler, content: bytes, start: int) -> None:
    request.wfile.write(b"220 mail.example.org ESMTP\r\n")


def hangs_up(request: Handler, content: bytes, start: int) -> None: ...


def internal_error(request: Handler, content: bytes, start: int) -> None:
    request.send_error(500)


GOOD_IN_THE_END: list[tuple[Answer, int]] = [
    (stalls_halfway, 100_000),
    (says_nothing, 0),
    (chunks_break_off, 60_000),
    (no_http, 0),
    (hangs_up, 0),
    (internal_error, 0),
]


@pytest.mark.parametrize(("answer", "came"), GOOD_IN_THE_END, ids=[answer.__name__ for answer, _ in GOOD_IN_THE_END])
def test_a_server_that_is_well_again_gives_the_rest(answer: Answer, came: int, tmp_path: Path) -> None:
    with serve(CONTENT, answer) as server:
        assert download(known(server), tmp_path / "file.bin") == HASH
    assert server.starts[:2] == [0, came]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [CONTENT]


@pytest.mark.parametrize("answer", [drips, more_than_said, no_length])
def test_odd_but_whole_answers_are_taken_at_once(answer: Answer, tmp_path: Path) -> None:
    with serve(CONTENT, answer) as server:
        assert download(known(server), tmp_path / "file.bin") == HASH
    assert server.starts == [0] and (tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("answer", [says_nothing, no_http, hangs_up, internal_error])
def test_a_server_that_stays_ill_is_given_up_in_one_line(answer: Answer, tmp_path: Path) -> None:
    with serve(CONTENT, *[answer] * 9) as server:
        message = r"^cannot download file\.bin \(.+\): go online, or fetch .* and put it at"
        with pytest.raises(StudyError, match=message):
            download(known(server), tmp_path / "file.bin")
        assert len(server.starts) == downloads.TRIES
    assert not (tmp_path / "file.bin").exists()


def test_a_file_cut_by_a_wrong_length_is_not_kept(tmp_path: Path) -> None:
    with serve(CONTENT, less_than_there_is) as server:
        with pytest.raises(StudyError, match="sent another file"):
            download(known(server), tmp_path / "file.bin")
        assert not os.listdir(tmp_path)
        assert download(known(server), tmp_path / "file.bin") == HASH
