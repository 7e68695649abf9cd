"""Weight files: fetched from a local server with a server's faults, read in the official formats, or refused."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch

from samantics.data import downloads
from samantics.errors import StudyError
from samantics.models import pocket, weights
from samantics.models.encoder import load_encoder, within_reach
from samantics.models.registry import ENCODERS
from samantics.models.weights import WeightFile, download, weight_file
from servers import Answer, Handler, Server, cut, serve, status
from small_models import SMALL, torchscript

CONTENT = hashlib.shake_256(b"weights").digest(300_000)
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(downloads, "WAIT", 0.01)
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "cache"))


def known(server: Server, sha256: str = HASH) -> WeightFile:
    return WeightFile("file.bin", server.url, sha256, 3, "none")


def no_ranges(request: Handler, content: bytes, start: int) -> None:
    request.head(200, len(content))
    request.wfile.write(content)


def stalls_halfway(request: Handler, content: bytes, start: int) -> None:
    request.head(206, len(content) - start)
    request.wfile.write(content[start : start + 100_000])
    request.server.over.wait(20)


def says_nothing(request: Handler, content: bytes, start: int) -> None:
    request.server.over.wait(20)


def drips(request: Handler, content: bytes, start: int) -> None:
    """Slowly, but never so slowly that it seems to have stopped."""
    request.head(206, len(content) - start)
    for place in range(start, len(content), 50_000):
        request.wfile.write(content[place : place + 50_000])
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


def no_http(request: Handler, content: bytes, start: int) -> None:
    request.wfile.write(b"220 mail.example.org ESMTP\r\n")


def hangs_up(request: Handler, content: bytes, start: int) -> None: ...


# ---------------------------------------------------------------------------------------------------- downloading


@pytest.mark.parametrize(
    ("answers", "starts"),
    [
        ([cut(100_000), status(503), cut(50_000)], [0, 100_000, 100_000, 150_000]),
        ([stalls_halfway], [0, 100_000]),
        ([cut(100_000), no_ranges], [0, 100_000]),
        ([says_nothing], [0, 0]),
        ([no_http], [0, 0]),
        ([hangs_up, status(500)], [0, 0, 0]),
        ([drips], [0]),
        ([more_than_said], [0]),
        ([no_length], [0]),
    ],
)
def test_a_server_that_is_ill_for_a_while_gives_the_rest(
    answers: list[Answer], starts: list[int], tmp_path: Path
) -> None:
    with serve(CONTENT, *answers) as server:
        assert download(known(server), tmp_path / "file.bin") == HASH
    assert server.starts() == starts
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [CONTENT]


@pytest.mark.parametrize("answer", [says_nothing, no_http, hangs_up, status(500)])
def test_a_server_that_stays_ill_is_given_up_in_one_line(answer: Answer, tmp_path: Path) -> None:
    with serve(CONTENT, *[answer] * 9) as server:
        message = r"^cannot download file\.bin \(.+\): go online, or fetch .* and put it at"
        with pytest.raises(StudyError, match=message):
            download(known(server), tmp_path / "file.bin")
        assert len(server.asked) == downloads.TRIES
    assert not (tmp_path / "file.bin").exists()


def test_a_download_is_resumed_by_the_next_run(tmp_path: Path) -> None:
    with serve(CONTENT, cut(100_000), *[status(500)] * (downloads.TRIES - 1)) as server:
        with pytest.raises(StudyError, match=r"cannot download file.bin .*put it at"):
            download(known(server), tmp_path / "file.bin")
        assert (tmp_path / "file.bin.part").stat().st_size == 100_000
        assert download(known(server), tmp_path / "file.bin") == HASH
        assert server.starts()[-1] == 100_000
        (tmp_path / "file.bin").rename(tmp_path / "file.bin.part")  # complete: no byte is needed
        assert download(known(server), tmp_path / "file.bin") == HASH


def test_another_file_than_expected_is_refused_and_deleted(tmp_path: Path) -> None:
    with serve(CONTENT, less_than_there_is) as server:
        for sha256 in (HASH, "0" * 64):
            with pytest.raises(StudyError, match="sent another file"):
                download(known(server, sha256), tmp_path / "file.bin")
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
        with pytest.raises(StudyError, match="sent another file"):
            download(wanted, tmp_path / "file.bin")


@pytest.mark.parametrize(("code", "message"), [(401, "accept its licence"), (403, "HF_TOKEN"), (404, "answers 404")])
def test_refusals_are_not_tried_again(tmp_path: Path, code: int, message: str) -> None:
    with serve(CONTENT, status(code)) as server, pytest.raises(StudyError, match=message):
        download(dataclasses.replace(known(server), gated=code != 404), tmp_path / "file.bin")
    assert server.starts() == [0]


def test_no_network_names_file_source_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    away = dataclasses.replace(ENCODERS["sam"].weights, url="http://127.0.0.1:9/sam.pth")
    monkeypatch.setitem(ENCODERS, "sam", dataclasses.replace(ENCODERS["sam"], weights=away))
    with pytest.raises(StudyError) as caught:
        load_encoder("sam", "official")
    assert all(part in str(caught.value) for part in (away.file, away.url, str(away.place)))


def test_cached_file_is_used_and_checked() -> None:
    with serve(CONTENT) as server:
        wanted = known(server)
        path, found = weight_file(wanted)
        assert found == HASH and weight_file(wanted) == (path, HASH) and server.starts() == [0]
        path.write_bytes(CONTENT[:-1])
        with pytest.raises(StudyError, match=r"is damaged .* delete it"):
            weight_file(wanted)


def test_gated_encoders_want_a_token_or_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    names, place = ("sam", "sam3", "dinov3", "random"), ENCODERS["dinov3"].weights.place
    assert within_reach(names, "official") == ("sam", "random") and within_reach(names, "random") == names
    place.parent.mkdir(parents=True)
    place.touch()
    assert within_reach(names, "official") == ("sam", "dinov3", "random")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    assert within_reach(names, "official") == names


# ------------------------------------------------------------------------------------------------ official formats


@pytest.mark.parametrize("name", SMALL)
def test_official_formats_go_through_a_server(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, entry, path = SMALL[name], ENCODERS[name], tmp_path / ENCODERS[name].weights.file
    torch.manual_seed(3)
    whole = small.whole().eval()
    small.save(whole, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if name == "clip":
        monkeypatch.setattr(weights, "OPENAI_CLIP", sha256)
    own = dataclasses.replace(entry.own, size=small.size)
    with serve(path.read_bytes()) as server:
        served = dataclasses.replace(entry.weights, url=server.url, sha256=sha256)
        monkeypatch.setitem(ENCODERS, name, dataclasses.replace(entry, weights=served, build=small.empty, own=own))
        encoder = load_encoder(name, "official")
    x = torch.randn(2, 3, small.size, small.size)
    with torch.no_grad():
        expected = entry.architecture.forward(small.encoder(whole), x)["final"].dense
    torch.testing.assert_close(encoder.encode(x)["final"].dense, expected, atol=1e-5, rtol=0)
    assert encoder.weights_hash == sha256[:16]


@pytest.mark.parametrize("name", SMALL)
def test_the_wrong_checkpoint_for_the_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SMALL["mae" if name == "dinov2" else "dinov2"]
    other.save(other.whole(), tmp_path / "other.safetensors")
    monkeypatch.setitem(ENCODERS, name, dataclasses.replace(ENCODERS[name], build=SMALL[name].empty))
    with pytest.raises(StudyError, match=f"not a checkpoint of the official {name}"):
        load_encoder(name, tmp_path / "other.safetensors")


def test_torchscript_of_another_hash_is_refused(tmp_path: Path) -> None:
    torchscript(pocket.build_clip(), tmp_path / "ViT-B-32.pt")
    with pytest.raises(StudyError, match="TorchScript"):
        load_encoder("clip", tmp_path / "ViT-B-32.pt")


# ----------------------------------------------------------------------------------------------------- the table


def test_the_table_in_the_docs_is_the_one_in_the_code() -> None:
    text = (Path(__file__).parents[1] / "docs" / "weights.md").read_text(encoding="utf-8")
    found = [line for line in text.splitlines() if line.startswith("| `")]
    expected = [
        f"| `{name}` | `{e.file}` | {f'{e.size} MB' if e.size else 'not known'} | "
        f"{f'`{e.sha256}`' if e.sha256 else 'as the hub states it'} | {e.licence}{', gated' * e.gated} | "
        f"{e.url.replace('{hub}', 'huggingface.co').removeprefix('https://')} |"
        for name, e in ((name, entry.weights) for name, entry in ENCODERS.items())
    ]
    assert found == expected
