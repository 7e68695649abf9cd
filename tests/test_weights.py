"""Weight files: fetched from a local server with a server's faults, read in the official formats, or refused."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    HieraConfig,
    HieraForPreTraining,
    HieraModel,
    Sam3VisionConfig,
    Sam3VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

from samantics.errors import StudyError
from samantics.models import official, pocket, weights
from samantics.models.encoder import load_encoder
from samantics.models.weights import FILES, WeightFile, download, read_weights, weight_file

CONTENT = os.urandom(3_000_000)
HASH = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` by path with ranges; ``faults`` are spent one a request: a status, or how much to send."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[tuple[str, int]] = []
        self.ranges: list[str] = []
        self.tokens: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.tokens.append(self.headers.get("Authorization"))
        if self.path.startswith("/hub/"):  # as the hub does: the hash, and where the bytes are
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/hub"))
            content = self.server.files[self.path.removeprefix("/hub")]
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.end_headers()
            return
        kind, number = self.server.faults.pop(0) if self.server.faults else ("", 0)
        if kind == "status" or self.path not in self.server.files:
            self.send_error(number or 404)
            return
        self.server.ranges.append(self.headers["Range"])
        start = 0 if kind == "no ranges" else int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        content = self.server.files[self.path]
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(200 if kind == "no ranges" else 206)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + number] if kind == "cut" else content[start:])

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    with Server() as running:
        running.files["/file.bin"] = CONTENT
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        monkeypatch.setattr(weights, "WAIT", 0.01)
        monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", running.url + "/hub")
        yield running
        running.shutdown()


def known(server: Server, sha256: str = HASH, url: str = "/file.bin") -> WeightFile:
    return WeightFile("file.bin", server.url + url, sha256, 3, "none")


# ---------------------------------------------------------------------------------------------------- downloading


def test_download(server: Server, tmp_path: Path) -> None:
    assert download(known(server), tmp_path / "file.bin") == HASH
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_a_broken_download_is_resumed(server: Server, tmp_path: Path) -> None:
    server.faults = [("cut", 1_000_000), ("status", 503), ("cut", 500_000)]
    assert download(known(server), tmp_path / "file.bin") == HASH
    assert server.ranges == ["bytes=0-", "bytes=1000000-", "bytes=1500000-"]


def test_a_download_is_resumed_by_the_next_run(server: Server, tmp_path: Path) -> None:
    server.faults = [("cut", 1_000_000), *[("status", 500)] * (weights.TRIES - 1)]
    with pytest.raises(StudyError, match=r"cannot download file.bin .*put it at"):
        download(known(server), tmp_path / "file.bin")
    assert (tmp_path / "file.bin.part").stat().st_size == 1_000_000
    assert download(known(server), tmp_path / "file.bin") == HASH
    assert server.ranges[-1] == "bytes=1000000-"


def test_a_server_without_ranges(server: Server, tmp_path: Path) -> None:
    server.faults = [("cut", 1_000_000), ("no ranges", 0)]
    assert download(known(server), tmp_path / "file.bin") == HASH


def test_a_complete_part_needs_no_bytes(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert download(known(server), tmp_path / "file.bin") == HASH


def test_another_file_than_expected_is_refused_and_deleted(server: Server, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="sent another file"):
        download(known(server, sha256="0" * 64), tmp_path / "file.bin")
    assert not list(tmp_path.iterdir())


def test_the_hash_the_hub_states_is_checked(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub = dataclasses.replace(known(server, sha256=""), url="{hub}/file.bin")
    server.faults = [("cut", 1_000_000)]
    assert download(hub, tmp_path / "file.bin") == HASH
    assert server.tokens == ["Bearer secret", None, "Bearer secret", None]  # the token stays with the hub
    (tmp_path / "file.bin.part").write_bytes(b"0" * len(CONTENT))
    with pytest.raises(StudyError, match="sent another file"):
        download(hub, tmp_path / "file.bin")


@pytest.mark.parametrize(("code", "message"), [(401, "accept its licence"), (403, "HF_TOKEN"), (404, "answers 404")])
def test_refusals_are_not_tried_again(server: Server, tmp_path: Path, code: int, message: str) -> None:
    server.faults = [("status", code)]
    with pytest.raises(StudyError, match=message):
        download(known(server), tmp_path / "file.bin")
    assert len(server.tokens) == 1


def test_no_network_names_file_source_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WAIT", 0.0)
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path))
    monkeypatch.setitem(weights.FILES, "sam", dataclasses.replace(FILES["sam"], url="http://127.0.0.1:9/sam.pth"))
    with pytest.raises(StudyError) as caught:
        load_encoder("sam", "official")
    for part in (FILES["sam"].file, "http://127.0.0.1:9/sam.pth", str(tmp_path / "weights" / FILES["sam"].file)):
        assert part in str(caught.value)


def test_a_full_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "_fetch_rest", full)
    with pytest.raises(StudyError, match="no space left"):
        download(known(server), tmp_path / "file.bin")


def test_cached_file_is_used_and_checked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weights.FILES, "sam", known(server))
    path, found = weight_file("sam")
    assert (found, len(server.tokens)) == (HASH, 1)
    assert weight_file("sam") == (path, HASH)
    assert len(server.tokens) == 1
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(StudyError, match=r"is damaged .* delete it"):
        weight_file("sam")


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="does not exist"):
        load_encoder("sam", tmp_path / "nothing.pth")


# ------------------------------------------------------------------------------------------------ official formats

TRUNK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
HIERA = {"embed_dim": 8, "image_size": (64, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}
DECODER = {"decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 2}
SAM3 = {"image_size": 56, "pretrain_image_size": 56, "window_size": 2, "global_attn_indexes": [1]}


def saved(model: Any, path: Path) -> None:
    """As the hub holds it: safetensors under the names of old."""
    model.save_pretrained(path.parent / "model")
    (path.parent / "model" / "model.safetensors").rename(path)


def torchscript(model: nn.Module, path: Path) -> None:
    """As OpenAI has it: TorchScript in 16 bits with three sizes among the tensors."""

    class Archive(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    archive = Archive()
    for name, value in model.half().state_dict().items():
        owner: nn.Module = archive
        *parents, leaf = name.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, Archive())
            owner = getattr(owner, parent)
        owner.register_buffer(leaf, value)
    archive.register_buffer("input_resolution", torch.tensor(224))
    torch.jit.save(torch.jit.trace(archive, torch.zeros(1)), path)


def mae() -> nn.Module:
    return ViTMAEForPreTraining(ViTMAEConfig(**TRUNK, image_size=64, mask_ratio=0.0, **DECODER_MAE)).eval()


DECODER_MAE = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
SIGLIP = SiglipConfig(
    vision_config={**TRUNK, "image_size": 64},
    text_config={**TRUNK, "vocab_size": 50, "projection_size": 32},
)


def hiera_of(whole: Any) -> nn.Module:
    """Its encoder without the masking of pretraining."""
    model = HieraModel(whole.config, add_pooling_layer=False)
    model.load_state_dict({key: value for key, value in whole.hiera.state_dict().items() if "pooler" not in key})
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Format:
    """A small model in its official format: the whole that is saved, the encoder in it, and the encoder to fill."""

    whole: Callable[[], nn.Module]
    encoder: Callable[[Any], nn.Module]
    empty: Callable[[], nn.Module]
    save: Callable[[Any, Path], None]
    size: int


DINOV2 = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16)
DINOV3 = DINOv3ViTConfig(**TRUNK, image_size=64, num_register_tokens=4)
SAM3_CONFIG = Sam3VisionConfig(backbone_config={**TRUNK, **SAM3, "model_type": "sam3_vit_model"})
FORMATS: dict[str, Format] = {
    "sam": Format(
        pocket.build_sam,
        lambda m: m,
        pocket.build_sam,
        lambda m, p: torch.save(m.state_dict(), p),
        pocket.DEFAULT.image_size,
    ),
    "sam2": Format(
        pocket.build_sam2,
        lambda m: m,
        pocket.build_sam2,
        lambda m, p: torch.save({"model": m.state_dict()}, p),
        pocket.DEFAULT.image_size,
    ),
    "clip": Format(pocket.build_clip, lambda m: m.float(), pocket.build_clip, torchscript, pocket.DEFAULT.image_size),
    "dinov2": Format(lambda: Dinov2Model(DINOV2), lambda m: m, lambda: Dinov2Model(DINOV2), saved, 64),
    "mae": Format(mae, lambda m: m.vit, lambda: ViTMAEModel(mae().config), saved, 64),
    "hiera": Format(
        lambda: HieraForPreTraining(HieraConfig(**HIERA, **DECODER)),
        hiera_of,
        lambda: HieraModel(HieraConfig(**HIERA, **DECODER), add_pooling_layer=False),
        saved,
        64,
    ),
    "sam3": Format(
        lambda: Sam3VisionModel(SAM3_CONFIG),
        lambda m: m,
        lambda: Sam3VisionModel(SAM3_CONFIG),
        lambda m, p: save_file({"detector_model.vision_encoder." + k: v for k, v in m.state_dict().items()}, p),
        56,
    ),
    "dinov3": Format(lambda: DINOv3ViTModel(DINOV3), lambda m: m, lambda: DINOv3ViTModel(DINOV3), saved, 64),
    "siglip2": Format(
        lambda: SiglipModel(SIGLIP),
        lambda m: m.vision_model,
        lambda: SiglipVisionModel(SIGLIP.vision_config),
        saved,
        64,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_official_formats_go_through_a_server(
    name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, entry = FORMATS[name], official.OFFICIAL[name]
    torch.manual_seed(3)
    whole, path = layout.whole().eval(), tmp_path / FILES[name].file
    layout.save(whole, path)
    server.files[f"/{path.name}"] = path.read_bytes()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    served = dataclasses.replace(FILES[name], url=f"{server.url}/{path.name}", sha256=sha256)
    monkeypatch.setitem(weights.FILES, name, served)
    size = dataclasses.replace(entry.own, size=layout.size)
    monkeypatch.setitem(official.OFFICIAL, name, dataclasses.replace(entry, build=layout.empty, own=size))
    encoder = load_encoder(name, "official")
    reference = layout.encoder(whole)
    x = torch.randn(2, 3, layout.size, layout.size)
    with torch.no_grad():
        expected = encoder.architecture.forward(reference, x)["final"].dense
    assert torch.allclose(encoder.encode(x)["final"].dense, expected, atol=1e-5)
    assert encoder.weights_hash == sha256[:16]


@pytest.mark.parametrize("name", FORMATS)
def test_the_wrong_checkpoint_for_the_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, entry = FORMATS[name], official.OFFICIAL[name]
    path = tmp_path / "other.safetensors"
    other = "dinov2" if name != "dinov2" else "mae"
    FORMATS[other].save(FORMATS[other].whole(), path)
    monkeypatch.setitem(official.OFFICIAL, name, dataclasses.replace(entry, build=layout.empty))
    with pytest.raises(StudyError, match=f"not a checkpoint of the official {name}"):
        load_encoder(name, path)


# -------------------------------------------------------------------------------------------------- hostile, damaged


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    proof, path = tmp_path / "proof", tmp_path / "sam.pth"
    torch.save({"model": {"weight": torch.zeros(1)}, "extra": Hostile(proof)}, path)
    with pytest.raises(StudyError, match="is refused: it holds more than tensors"):
        load_encoder("sam", path)
    path.write_bytes(pickle.dumps(Hostile(proof)))
    with pytest.raises(StudyError, match=r"sam\.pth"):
        load_encoder("sam", path)
    assert not proof.exists()


def test_torchscript_of_another_hash_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ViT-B-32.pt"
    torchscript(pocket.build_clip(), path)
    with pytest.raises(StudyError, match="TorchScript"):
        load_encoder("clip", path)


@pytest.mark.parametrize("name", ["sam.pth", "dinov2.safetensors"])
def test_damaged_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    tensors = {"weight": torch.zeros(1000)}
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        path.write_bytes(damaged)
        with pytest.raises(StudyError, match=name):
            read_weights(path, "")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(StudyError, match="not a table of tensors"):
        read_weights(tmp_path / "a.pth", "")


# ----------------------------------------------------------------------------------------------------- the table


def test_the_table_in_the_docs_is_the_one_in_the_code() -> None:
    text = (Path(__file__).parents[1] / "docs" / "weights.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    assert [row[0] for row in rows] == list(FILES)
    for name, file, size, sha256, licence, source in rows:
        entry = FILES[name]
        assert file == entry.file
        assert size == (f"{entry.size} MB" if entry.size else "not known")
        assert sha256 == (entry.sha256 or "as the hub states it")
        assert licence.removesuffix(", gated") == entry.licence
        assert licence.endswith("gated") == entry.gated
        assert source == entry.url.replace("{hub}", "huggingface.co").removeprefix("https://")
