"""Hostile input through the doors that a user's files come in by: a line that helps, or the right result.

Refused means `StudyError` in one line and nothing else: no other exception, no wait without end, no code run, nothing
written elsewhere. What is odd rather than hostile stands in `test_folders` and `test_coco`.
"""

import copy
import dataclasses
import functools
import hashlib
import io
import json
import operator
import os
import signal
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from torchvision import datasets

from refusals import refused
from report import notebook_page, write_report
from samantics.cache import hash_file
from samantics.data import coco
from samantics.data.classification import imagenette
from samantics.data.coco_files import load_coco
from samantics.data.folders import class_names, image_folders, open_image
from samantics.errors import StudyError
from samantics.metrics import coco_ap as evaluation
from samantics.models import pocket, weights
from samantics.models.encoder import load_encoder
from samantics.models.registry import ENCODERS
from samantics.models.weights import WeightFile, read_weights
from samantics.probing.features import encode_images
from samantics.run import Run
from samantics.training_free.mask_features import encode_masks
from samantics.training_free.proposals import ProposalSettings, get_proposals
from stub_encoder import MEAN, LookUp
from test_coco import INF, NAN, RUNS, content, load
from test_folders import JPEG, PICTURE, encoded

FOREVER = 20  # seconds
pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow and torch also warn of what is damaged
searched = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def _nothing_waits_for_ever() -> Iterator[None]:
    def hang(*_: Any) -> None:
        pytest.fail("it hangs")  # no Exception, so that nobody catches it

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(FOREVER)
    yield
    signal.alarm(0)


def hostile(path: Path) -> bytes:
    """A pickle that makes a folder `proof` beside the file when it is read."""
    return b"cposix\nmkdir\n(V%s\ntR." % bytes(path.with_name("proof"))


Case = tuple[str, Callable[[Path], Any], str]  # an odd file: its name, what makes it, words of the message (a pattern)


def unless_refused(call: Callable[[], Any], where: Path) -> Any:
    """What comes back; None where it is refused in words that name the place."""
    try:
        return call()
    except StudyError as error:
        message = str(error)
    assert str(where) in message
    return None


def write(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


# --------------------------------------------------------------------------------------------------------- images


def claims(side: int) -> bytes:
    """A small picture whose header says that it has so many rows and columns."""
    data = encoded(PICTURE, "PNG")
    head = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


def socket_at(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def program(path: Path) -> None:
    """A program in PostScript, for which Pillow calls Ghostscript; a stand-in for that leaves a proof."""
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    ghostscript = path.with_name("gs")
    ghostscript.write_text(f"#!/bin/sh\necho > {path.with_name('proof')}\n")
    ghostscript.chmod(0o755)


TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("title", "\0" * 10**8, zip=True)
TEXT_BOMB = encoded(PICTURE, "PNG", pnginfo=TEXT)
IMAGES: dict[str, Case] = {
    "a bomb": ("a.png", write(claims(20_000)), "has far over 100 million pixels: shrink it"),
    "a bomb of text": ("a.png", write(TEXT_BOMB), "cannot be read as an image .*too large"),
    "a program named .jpg": ("a.jpg", program, "cannot be read as an image .*cannot identify"),
    "a pipe": ("a.png", os.mkfifo, "is a folder, pipe or device and not an image file: remove it"),
    "a socket": ("a.png", socket_at, "is a folder, pipe or device"),
    "a link to zeros without end": ("a.png", lambda p: p.symlink_to("/dev/zero"), "is a folder, pipe or device"),
    "a link to itself": ("a.png", lambda p: p.symlink_to(p), "Too many levels of symbolic links"),
    "a link to nothing": ("a.png", lambda p: p.symlink_to("gone"), "does not exist: check the path"),
    "text": ("a.jpg", write(b"no picture"), "cannot be read as an image .*cannot identify"),
    "fractions": ("a.tif", lambda p: Image.fromarray(np.ones((4, 4), np.float32)).save(p), "floating point pixels"),
    "121 million pixels": ("a.png", write(claims(11_000)), "has 11000x11000 pixels, over 100 million: shr"),
    "a name of 256 bytes": ("a" * 252 + ".png", lambda p: None, "File name too long"),
    "a NUL byte in the name": ("a\0.png", lambda p: None, r"a\\x00\.png' cannot be read .*null"),
    "a terminal's commands in the name": ("\x1b[2J\n.png", lambda p: p.touch(), r"\\x1b\[2J\\n\.png' cannot"),
}


@pytest.mark.parametrize("what", IMAGES)
def test_odd_image_files_are_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    file, write, says = IMAGES[what]
    write(path := tmp_path / file)
    message = refused(says, open_image, path)
    assert str(path) in message or repr(str(path)) in message
    assert not (tmp_path / "proof").exists()


CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8)


def damaged(data: bytes, changes: list[tuple[int, int]], keep: float) -> bytes:
    """Some bytes changed, every second of them near the start where headers are, and the end cut off."""
    changed = bytearray(data)
    for number, (place, value) in enumerate(changes):
        changed[place % (len(data) if number % 2 else min(len(data), 64))] = value
    return bytes(changed[: int(keep * len(data))])


KINDS = ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "JPEG2000", "AVIF", "QOI", "TGA", "SGI", "PCX", "ICO")
FORMATS = [encoded(PICTURE, kind) for kind in KINDS]


@settings(searched, max_examples=150)
@given(st.sampled_from(FORMATS), CHANGES, st.floats(0.1, 1))
def test_damaged_image_files_open_or_are_named(
    tmp_path: Path, data: bytes, changes: list[tuple[int, int]], keep: float
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(damaged(data, changes, keep))
    image = unless_refused(lambda: open_image(path), path)
    assert image is None or image.mode == "RGB"


@pytest.mark.parametrize("size", [(1, 1), (10_000, 120), (120, 10_000)])
def test_pictures_of_extreme_shape_give_finite_inputs_features_and_masks(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, (200, 30, 30)).save(tmp_path / "a.png")
    entry = {"id": 7, "file_name": "a.png", "width": size[0], "height": size[1]}
    (tmp_path / "x.json").write_text(json.dumps({"images": [entry]}))
    dataset = load_coco(tmp_path / "x.json", tmp_path)
    encoders = {name: load_encoder(name, "zoo_random") for name in ("sam", "dinov2")}
    for encoder in (load_encoder("sam2", "zoo_random"), encoders["sam"]):
        found = get_proposals(encoder, dataset, ProposalSettings(2, 0.0, 0.0), tmp_path)[7]
        assert len(found) and (found.boxes[:, 2:] <= size).all() and (found.boxes[:, 2:] > found.boxes[:, :2]).all()
        assert np.isfinite(found.boxes).all() and np.isfinite(found.stability).all()
    features = encode_masks(encoders, dataset, {7: found.rles})
    vectors = [features.of(name, 7) for name in encoders]
    assert all(np.isfinite(v).all() and v.any(axis=1).all() for v in vectors)
    for name in ("sam", "sam2", "clip", "dinov2"):
        assert ENCODERS[name].own(open_image(tmp_path / "a.png")).isfinite().all()


# ------------------------------------------------------------------------------------------ class folders, archives


NAMES = (b"caf\xe9", b"two\nlines", b"<script>alert(1)<", b"-rf", b" ", b"n01440764", "猫".encode(), b"x" * 255)


def test_class_folders_of_any_name_with_odd_things_in_them_are_read_and_shown(tmp_path: Path, pocket_run: Run) -> None:
    for folder in [os.path.join(bytes(tmp_path), b"data", name, b"deeper") for name in NAMES]:
        os.makedirs(folder)
        for file in (b"\xff\xfe.png", b"a\nb.png", *(b"%d.png" % number for number in range(4))):
            Path(os.fsdecode(os.path.join(folder, file))).write_bytes(JPEG)
    odd = tmp_path / "data" / "-rf" / "deeper"
    os.mkfifo(odd / "pipe.png")
    socket_at(odd / "socket.png")
    (odd / "loop.png").symlink_to(odd / "loop.png")
    (odd / "gone.png").symlink_to("nowhere")
    (odd / "round").symlink_to(tmp_path)
    (odd / "empty.jpg").touch()
    (odd / "text.jpg").write_text("no picture")
    (odd / "folder.jpg").mkdir()
    encoder, skipped, parts = load_encoder("dinov2", "zoo_random"), set(), image_folders(tmp_path / "data")
    for part in parts:
        store = encode_images(encoder, part, [MEAN], part.hash, folder=tmp_path / "store", max_unreadable=0.7)
        skipped |= {part.paths[row].name for row in store.skipped}
        assert np.isfinite(np.asarray(store.column(MEAN))).all() and len(store.kept) + len(store.skipped) == len(part)
    assert skipped == {"pipe.png", "socket.png", "loop.png", "gone.png", "empty.jpg", "text.jpg"}
    names = class_names(parts[0].classes)
    assert set(names) == {"caf?", "two lines", "<script>alert(1)<", "-rf", "(blank)", "n01440764", "猫", "x" * 255}
    pocket_run.save(None, pd.DataFrame({"class": names}), "99_classes", names[0])
    assert set(pd.read_csv(pocket_run.figures / "99_classes.csv")["class"]) == set(names)


Members = list[tuple[str, bytes, str]]  # of an archive: name, kind, where a link leads
ARCHIVES: dict[str, tuple[Members, str]] = {  # what is in it besides an Imagenette, what is said
    "a name that leads out": ([("../victim", tarfile.REGTYPE, "")], "outside the destination"),
    "a link that leads out": ([("a", tarfile.SYMTYPE, "../.."), ("a/victim", tarfile.REGTYPE, "")], "outside the dest"),
    "a hard link that leads out": ([("a", tarfile.LNKTYPE, "../../victim"), ("a", tarfile.REGTYPE, "")], "outside"),
    "a device": ([("a", tarfile.CHRTYPE, "")], "special file"),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_an_archive_cannot_write_outside_its_folder(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, victim = tmp_path / "data", tmp_path / "victim"
    root.mkdir()
    victim.write_text("mine")
    good = [f"imagenette2-320/{split}/{c}/{n}.JPEG" for split in ("train", "val") for c in "ab" for n in "01"]
    members, says = ARCHIVES[what]
    with tarfile.open(root / "imagenette2-320.tgz", "w:gz") as archive:
        for name, kind, link in [(name, tarfile.REGTYPE, "") for name in good] + members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(JPEG) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(JPEG))
    md5 = hashlib.md5((root / "imagenette2-320.tgz").read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", {"320px": ("http://x/imagenette2-320.tgz", md5)})
    assert str(root) in refused(says, imagenette, root)
    assert [path.name for path in root.iterdir()] == ["imagenette2-320.tgz"] and victim.read_text() == "mine"


# ------------------------------------------------------------------------------------------------------------- COCO


def test_any_name_of_a_category_is_shown_and_never_run(tmp_path: Path, pocket_run: Run) -> None:
    script, half = "<script>alert(1)</script>", "half \ud800\na letter"
    data = content()
    data["categories"] = [{"id": 3, "name": script}, {"id": 4, "name": half}, {"id": 5, "name": 5}]
    names = load(tmp_path, data).categories
    assert names == {3: script, 4: "half ? a letter", 5: "5"}
    frame = pd.DataFrame({"category": list(names.values())})
    pocket_run.save(None, frame, "99_table", f"The category {script}.")
    cell = nbformat.v4.new_code_cell("data.notes")
    shown = nbformat.v4.new_output("display_data", {"text/html": frame.to_html()})
    cell.outputs = [shown, nbformat.v4.new_output("stream", name="stdout", text=f"category 3 ({script})")]
    page = notebook_page(nbformat.v4.new_notebook(cells=[cell]), script)
    for text in (write_report(pocket_run.figures).read_text(), page):
        assert script not in text and "&lt;script&gt;alert(1)" in text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6)
    | st.sampled_from([7, 3, 1, 0, 80, 100, "a.png", "../a.png"]),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner),
    max_leaves=8,
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, part in inside for way in ((*at, key), *places(part, (*at, key)))]


@st.composite
def mutations(draw: st.DrawFn) -> Any:
    """A good file with one to three things in it replaced, doubled or taken out."""
    data = content()
    runs = [800, 900, 6300], coco.rles_of(np.ones((1, 80, 100), bool))[0]["counts"]
    for number, counts in enumerate(runs, start=2):
        changed = {"id": number, "segmentation": {**RUNS, "counts": counts}}
        data["annotations"].append(data["annotations"][0] | changed)
    data = json.loads(json.dumps(data))  # its own, all through
    for _ in range(draw(st.integers(1, 3))):
        *way, key = draw(st.sampled_from(places(data)))
        owner = functools.reduce(operator.getitem, way, data)
        change = draw(st.sampled_from(["set", "set", "set", "delete", "double"]))
        if change == "set":
            owner[key] = draw(VALUES)
        elif change == "delete":
            del owner[key]
        elif isinstance(owner, list):
            owner.append(copy.deepcopy(owner[key]))
    return data


@settings(searched, max_examples=200)
@given(mutations())
def test_a_changed_coco_file_is_refused_or_measured_rightly(tmp_path: Path, data: Any) -> None:
    dataset = unless_refused(lambda: load(tmp_path, data), tmp_path)
    if dataset is None:
        return
    for i in dataset.instances:
        record = dataset.images[i.image_id]
        assert 0 <= i.box[0] < i.box[2] <= record.width and 0 <= i.box[1] < i.box[3] <= record.height
        assert 0 < i.area <= record.width * record.height
        assert coco.mask_of(i.rle).shape == (record.height, record.width)
    for iou_type in evaluation.IOU_TYPES:
        ap = evaluation.evaluate(dataset, evaluation.perfect_results(dataset), iou_type).metrics["AP"]
        assert ap is None or ap == pytest.approx(100)


# ---------------------------------------------------------------------------------------------------------- weights


def tensors_file(header: bytes = b"{}", claimed: int | None = None, **spans: Any) -> Callable[[Path], Any]:
    """A safetensors file of 16 bytes of numbers, whose header lies about its length, or about the tensors' bytes."""
    entries = {name: {"dtype": "F32", "shape": s, "data_offsets": [a, b]} for name, (a, b, *s) in spans.items()}
    text = json.dumps(entries).encode() if spans else header
    return write(struct.pack("<Q", claimed or len(text)) + text + bytes(16))


def zipped(path: Path, **members: bytes) -> None:
    """By hand what torch.save would write."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name.replace('_', '.')}", data)


WEIGHTS: dict[str, Case] = {
    "a pickle named .safetensors": ("w.safetensors", lambda p: p.write_bytes(hostile(p)), "is damaged"),
    "a pickle in a zip": ("w.pth", lambda p: zipped(p, data_pkl=hostile(p), version=b"3"), "holds more than tens"),
    "a zip bomb": ("w.pth", lambda p: zipped(p, data_pkl=bytes(10**8)), "is packed, which no checkpoint is"),
    "a table of numbers": ("w.pth", lambda p: torch.save({1: torch.ones(1)}, p), "is not a table of tensors"),
    "sparse tensors": ("w.pth", lambda p: torch.save({"a": torch.ones(2).to_sparse()}, p), "not a table of tens"),
    "a folder": ("w.safetensors", os.mkdir, "cannot be read as weights|is damaged"),
    "a header over all bounds": ("w.safetensors", tensors_file(claimed=2**63), "is damaged .*header"),
    "offsets that overlap": ("w.safetensors", tensors_file(a=(0, 8, 2), b=(4, 12, 2)), "is damaged"),
    "offsets past the end": ("w.safetensors", tensors_file(a=(0, 4000, 1000)), "is damaged"),
    "a shape that overflows": ("w.safetensors", tensors_file(a=(0, 16, 2**62, 16)), "is damaged"),
    "a header 100,000 deep": ("w.safetensors", tensors_file(b'{"a":' * 10**5), "is damaged"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_hostile_weights_are_refused_and_not_run(what: str, tmp_path: Path) -> None:
    file, write, says = WEIGHTS[what]
    write(path := tmp_path / file)
    assert str(path) in refused(says, read_weights, path, hash_file(path) if path.is_file() else "")
    assert not (tmp_path / "proof").exists() and not (tmp_path.parent / "proof").exists()


@pytest.mark.parametrize("value", [NAN, INF])
def test_weights_that_are_no_numbers_never_reach_a_result(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pocket.build_sam()
    with torch.no_grad():
        model.image_encoder.neck[0].weight[0, 0, 0, 0] = value
    torch.save(model.state_dict(), tmp_path / "sam.pth")
    small = dataclasses.replace(ENCODERS["sam"], build=pocket.build_sam)
    monkeypatch.setitem(ENCODERS, "sam", small)
    refused(f"{tmp_path}/sam.pth.* are not all finite numbers", load_encoder, "sam", tmp_path / "sam.pth")


@settings(searched, max_examples=200)
@given(st.sampled_from(["w.pth", "w.safetensors"]), CHANGES, st.floats(0.1, 1))
def test_damaged_weights_are_tables_of_tensors_or_refused(
    tmp_path: Path, name: str, changes: list[tuple[int, int]], keep: float
) -> None:
    path, tensors = tmp_path / name, {"a": torch.ones(3, 4), "b": torch.zeros(2).half()}
    torch.save(tensors, path) if name == "w.pth" else save_file(tensors, path)
    path.write_bytes(damaged(path.read_bytes(), changes, keep))
    found = unless_refused(lambda: read_weights(path, ""), path) or {}
    assert all(isinstance(value, torch.Tensor) for value in found.values())


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("HF_ENDPOINT", "huggingface.co", "is 'huggingface.co', which is no address: begin it with https"),
        ("HF_ENDPOINT", "file:///etc", "is 'file:///etc', which is no address"),
        ("HF_TOKEN", "secret\r\nHost: evil", "has characters that no token has: set it again"),
    ],
)
def test_odd_settings_of_the_hub_are_named(
    variable: str, value: str, says: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv(variable, value)
    wanted = WeightFile("w.safetensors", "{hub}/w.safetensors", "", 1, "none")
    refused(f"{variable} {says}", weights.download, wanted, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_shard_that_is_no_table_of_features_is_refused_and_not_run(tmp_path: Path) -> None:
    stub = LookUp(np.ones((5, 2), np.float32))
    store = encode_images(stub.encoder, stub.images, [MEAN], "data", folder=tmp_path)
    (shard,) = store.folder.glob("*.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (10,)})
    np.save(numbers := io.BytesIO(), np.ones(10))
    for data in (header.getvalue() + hostile(shard), numbers.getvalue()):
        shard.write_bytes(data)
        assert str(shard) in refused("is damaged: delete it", lambda: np.asarray(store.column(MEAN)))
    assert not shard.with_name("proof").exists()
