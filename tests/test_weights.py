"""Weight files: fetched from a local server with a server's faults, kept, or refused."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

from refusals import refused
from samantics.data import downloads
from samantics.errors import StudyError
from samantics.models.encoder import within_reach
from samantics.models.weights import OFFICIAL, WeightFile, download, weight_file
from servers import Answer, Handler, Server, cut, serve, status

CONTENT = hashlib.shake_256(b"weights").digest(300_000)
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(downloads, "WAIT", 0.01)
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "cache"))


def known(server: Server, sha256: str = HASH) -> WeightFile:
    return WeightFile("file.bin", server.url, sha256, 3, "none")


def sends(code: int = 206, body: slice | None = None, more: bytes = b"", said: int | None = -1) -> Answer:
    """A part of the file, by default what was asked for, and more, under a length that is right unless one is said."""

    def answer(request: Handler, content: bytes, start: int) -> None:
        part = content[slice(start, None) if body is None else body]
        request.head(code, len(part) if said == -1 else said)
        request.wfile.write(part + more)

    return answer


def stalls_halfway(request: Handler, content: bytes, start: int) -> None:
    cut(100_000)(request, content, start)
    request.server.over.wait(20)


def says_nothing(request: Handler, content: bytes, start: int) -> None:
    request.server.over.wait(20)


def drips(request: Handler, content: bytes, start: int) -> None:
    """Slowly, but never so slowly that it seems to have stopped."""
    request.head(206, len(content) - start)
    for place in range(start, len(content), 50_000):
        request.wfile.write(content[place : place + 50_000])
        request.server.over.wait(0.05)


def no_http(request: Handler, content: bytes, start: int) -> None:
    request.wfile.write(b"220 mail.example.org ESMTP\r\n")


def hangs_up(request: Handler, content: bytes, start: int) -> None: ...


@pytest.mark.parametrize(
    ("answers", "starts"),
    [
        ([cut(100_000), status(503), cut(50_000)], [0, 100_000, 100_000, 150_000]),
        ([stalls_halfway], [0, 100_000]),
        ([cut(100_000), sends(200, slice(None))], [0, 100_000]),  # knows no ranges
        ([says_nothing], [0, 0]),
        ([no_http], [0, 0]),
        ([hangs_up, status(500)], [0, 0, 0]),
        ([drips], [0]),
        ([sends(more=b"and more", said=len(CONTENT))], [0]),
        ([sends(said=None)], [0]),
    ],
)
def test_a_server_that_is_ill_for_a_while_gives_the_rest(answers: Any, starts: list[int], tmp_path: Path) -> None:
    with serve(CONTENT, *answers) as server:
        assert download(known(server), tmp_path / "file.bin") == HASH
    assert server.starts() == starts
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [CONTENT]


@pytest.mark.parametrize("answer", [says_nothing, no_http, hangs_up, status(500)])
def test_a_server_that_stays_ill_is_given_up_in_one_line(answer: Answer, tmp_path: Path) -> None:
    with serve(CONTENT, *[answer] * 9) as server:
        message = r"^cannot download file\.bin \(.+\): go online, or fetch .* and put it at"
        refused(message, download, known(server), tmp_path / "file.bin")
        assert len(server.asked) == downloads.TRIES
    assert not (tmp_path / "file.bin").exists()


def test_a_download_is_resumed_by_the_next_run(tmp_path: Path) -> None:
    with serve(CONTENT, cut(100_000), *[status(500)] * (downloads.TRIES - 1)) as server:
        refused(r"cannot download file.bin .*put it at", download, known(server), tmp_path / "file.bin")
        assert (tmp_path / "file.bin.part").stat().st_size == 100_000
        assert download(known(server), tmp_path / "file.bin") == HASH
        assert server.starts()[-1] == 100_000
        (tmp_path / "file.bin").rename(tmp_path / "file.bin.part")  # complete: no byte is needed
        assert download(known(server), tmp_path / "file.bin") == HASH


def test_another_file_than_expected_is_refused_and_deleted(tmp_path: Path) -> None:
    with serve(CONTENT, sends(body=slice(1000))) as server:
        for sha256 in (HASH, "0" * 64):
            refused("sent another file", download, known(server, sha256), tmp_path / "file.bin")
            assert not list(tmp_path.iterdir())


def test_the_hub_states_the_hash_and_keeps_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def redirects(request: Handler, content: bytes, start: int) -> None:
        request.send_response(302)
        request.send_header("Location", storage.url)
        request.send_header("X-Linked-Etag", f'"{HASH}"')
        request.end_headers()

    monkeypatch.setenv("HF_TOKEN", "secret")
    wanted = WeightFile("file.bin", "{hub}/file.bin", "", 3, "none")
    with serve(CONTENT, cut(100_000)) as storage, serve(b"", *[redirects] * 9) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address + "/")
        assert download(wanted, tmp_path / "file.bin") == HASH
        assert set(hub.tokens) == {"Bearer secret"} and storage.tokens == [None, None]
        (tmp_path / "file.bin.part").write_bytes(b"0" * len(CONTENT))
        refused("sent another file", download, wanted, tmp_path / "file.bin")


@pytest.mark.parametrize(("code", "message"), [(401, "accept its licence"), (403, "HF_TOKEN"), (404, "answers 404")])
def test_refusals_are_not_tried_again(tmp_path: Path, code: int, message: str) -> None:
    with serve(CONTENT, status(code)) as server, pytest.raises(StudyError, match=message):
        download(dataclasses.replace(known(server), gated=code != 404), tmp_path / "file.bin")
    assert server.starts() == [0]


def test_no_network_names_file_source_and_place() -> None:
    away = dataclasses.replace(OFFICIAL["sam"], url="http://127.0.0.1:9/sam.pth")
    message = refused("cannot download", weight_file, away)
    assert all(part in message for part in (away.file, away.url, str(away.place)))


def test_cached_file_is_used_and_checked() -> None:
    with serve(CONTENT) as server:
        wanted = known(server)
        path, found = weight_file(wanted)
        assert found == HASH and weight_file(wanted) == (path, HASH) and server.starts() == [0]
        path.write_bytes(CONTENT[:-1])
        refused(r"is damaged .* delete it", weight_file, wanted)


def test_gated_encoders_want_a_token_or_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    names, place = ("sam", "sam3", "dinov3", "random"), OFFICIAL["dinov3"].place
    assert within_reach(names, "official") == ("sam", "random") and within_reach(names, "random") == names
    place.parent.mkdir(parents=True)
    place.touch()
    assert within_reach(names, "official") == ("sam", "dinov3", "random")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    assert within_reach(names, "official") == names


def test_an_encoder_is_within_reach_of_the_weights_that_there_are_of_it() -> None:
    """`--weights official` or `random` at `pocket`, `--weights zoo` at `lite`."""
    names = ("sam", "hiera", "supervised", "random")
    assert within_reach(names, "zoo") == ("sam", "supervised", "random")
    assert within_reach(names, "official") == within_reach(names, "random") == ("sam", "hiera", "random")


def test_the_table_in_the_docs_is_the_one_in_the_code() -> None:
    text = (Path(__file__).parents[1] / "docs" / "weights.md").read_text(encoding="utf-8")
    found = [line for line in text.splitlines() if line.startswith("| `")]
    expected = [
        f"| `{name}` | `{e.file}` | {f'{e.size} MB' if e.size else 'not known'} | "
        f"{f'`{e.sha256}`' if e.sha256 else 'as the hub states it'} | {e.licence}{', gated' * e.gated} | "
        f"{e.url.replace('{hub}', 'huggingface.co').removeprefix('https://')} |"
        for name, e in OFFICIAL.items()
    ]
    assert found == expected
