"""Official weight files: where each comes from, fetched once, verified, and read without running code of theirs.

A file is taken from the path given, else from the cache folder, else downloaded (resumed where it broke off, tried
again, its SHA-256 checked). Nothing is downloaded at import or in the tests. docs/weights.md is the table of
:data:`FILES`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import pickle
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from samantics.cache import cache_dir, hash_file
from samantics.errors import StudyError

TRIES = 5
WAIT = 1.0  # seconds before the second try; doubled each time
CHUNK = 1 << 20
TIMEOUT = 30.0


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """One official file.

    Attributes:
        file: name in the cache folder.
        url: its source; of the hub's files ``{hub}`` stands for ``$HF_ENDPOINT`` or the hub itself.
        sha256: of the file; empty where we could not learn it: then what the server states is checked.
        size: megabytes, about; 0 where we could not learn it.
        licence: of the weights.
        gated: whether the source wants an account that has accepted the licence (``$HF_TOKEN``).
    """

    file: str
    url: str
    sha256: str
    size: int
    licence: str
    gated: bool = False


_META = "https://dl.fbaipublicfiles.com"
_OPENAI = "https://openaipublic.azureedge.net/clip/models"
_CLIP_HASH = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"

FILES: Mapping[str, WeightFile] = {
    "sam": WeightFile(
        "sam_vit_b_01ec64.pth",
        f"{_META}/segment_anything/sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        375,
        "Apache-2.0",
    ),
    "sam2": WeightFile(
        "sam2.1_hiera_tiny.pt",
        f"{_META}/segment_anything_2/092824/sam2.1_hiera_tiny.pt",
        "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
        156,
        "Apache-2.0",
    ),
    "clip": WeightFile("ViT-B-32.pt", f"{_OPENAI}/{_CLIP_HASH}/ViT-B-32.pt", _CLIP_HASH, 354, "MIT"),
    "dinov2": WeightFile(
        "dinov2-small.safetensors",
        "{hub}/facebook/dinov2-small/resolve/main/model.safetensors",
        "ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1",
        88,
        "Apache-2.0",
    ),
    "mae": WeightFile(
        "vit-mae-base.safetensors",
        "{hub}/facebook/vit-mae-base/resolve/main/model.safetensors",
        "479dcef4bd5df06259399027b789f21e9d9a1b79f37155a64176d55bc26fdae8",
        448,
        "Apache-2.0",
    ),
    "hiera": WeightFile(
        "hiera-tiny-224-mae.safetensors",
        "{hub}/facebook/hiera-tiny-224-mae-hf/resolve/main/model.safetensors",
        "",
        220,
        "CC-BY-NC-4.0",
    ),
    "sam3": WeightFile(
        "sam3.safetensors", "{hub}/facebook/sam3/resolve/main/model.safetensors", "", 0, "SAM License", gated=True
    ),
    "dinov3": WeightFile(
        "dinov3-vits16.safetensors",
        "{hub}/facebook/dinov3-vits16-pretrain-lvd1689m/resolve/main/model.safetensors",
        "",
        86,
        "DINOv3 License",
        gated=True,
    ),
    "siglip2": WeightFile(
        "siglip2-base-patch16-224.safetensors",
        "{hub}/google/siglip2-base-patch16-224/resolve/main/model.safetensors",
        "",
        1500,
        "Apache-2.0",
    ),
}


def weight_file(name: str, path: Path | str | None = None) -> tuple[Path, str]:
    """The official file of an encoder and its SHA-256: the path given, else the cached one, else it is downloaded.

    Raises:
        StudyError: no such file, damaged, or out of reach; says where it comes from and where to put it.
    """
    if path is not None:
        if not os.path.isfile(path):
            raise StudyError(f"{path} does not exist: give the path of {FILES[name].file}")
        return Path(path), hash_file(path)
    known = FILES[name]
    place = cache_dir() / "weights" / known.file
    if not place.exists():
        with _locked(place):
            if not place.exists():  # another process may have fetched it meanwhile
                return place, download(known, place)
    found, expected = hash_file(place), known.sha256
    if expected and found != expected:
        raise StudyError(
            f"{place} is damaged (SHA-256 {found[:12]}, expected {expected[:12]}): delete it to download it again"
        )
    return place, found


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process downloads, the others wait."""
    lock = FileLock(place.with_name(place.name + ".lock"))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise StudyError(f"cannot write {place.parent}: make it writable or set SAMANTICS_CACHE") from error
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------------- downloading


def download(known: WeightFile, place: Path) -> str:
    """Fetch a file to ``place``, resuming an earlier part; returns its verified SHA-256.

    Raises:
        StudyError: no network, refused, or the file that came has another hash (it is deleted).
    """
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not hub.startswith(("https://", "http://")):
        raise StudyError(f"HF_ENDPOINT is {hub!r}, which is no address: begin it with https://, or unset it")
    url = known.url.replace("{hub}", hub.rstrip("/"))
    part = place.with_name(place.name + ".part")
    stated = ""
    for attempt in range(TRIES):
        try:
            stated = _fetch_rest(url, part, known)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise StudyError(_refusal(known, url, place, error.code)) from error
            reason: Exception = error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in (28, 122):  # no space, quota
                raise StudyError(f"no space left while writing {part}: free some space and run again") from error
            reason = error
        if attempt == TRIES - 1:
            why = " ".join(str(reason).split())  # may hold what a server sent in place of a status line
            raise StudyError(
                f"cannot download {known.file} ({why}): go online, or fetch {url} elsewhere and put it at {place}"
            ) from reason
        time.sleep(WAIT * 2**attempt)
    found, expected = hash_file(part), known.sha256 or stated
    if expected and found != expected:
        part.unlink()
        raise StudyError(
            f"{url} sent another file (SHA-256 {found[:12]}, not {expected[:12]}): run again, or put it at {place}"
        )
    os.replace(part, place)
    return found


def _refusal(known: WeightFile, url: str, place: Path, code: int) -> str:
    if code in (401, 403):
        return f"{url} is gated: accept its licence there and set HF_TOKEN, or put the file at {place}"
    return f"{url} answers {code}: fetch {known.file} elsewhere and put it at {place}"


def _fetch_rest(url: str, part: Path, known: WeightFile) -> str:
    """Append what is missing to ``part``; returns the SHA-256 that the server states, or nothing."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "samantics", "Range": f"bytes={have}-"})  # noqa: S310
    if known.url.startswith("{hub}") and (token := os.environ.get("HF_TOKEN", "").strip()):
        if not (token.isascii() and token.isprintable()):
            raise StudyError("HF_TOKEN has characters that no token has: set it again")
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # stays with the hub
    catcher = _KeepHash()
    try:
        response = urllib.request.build_opener(catcher).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is missing, or the part is of another file: the hash will tell
            return catcher.stated
        raise
    with response:
        if response.status != 206:
            have = 0  # the server starts at the beginning
        length = int(response.headers.get("Content-Length") or 0)
        bar = tqdm(total=have + length or None, initial=have, unit="B", unit_scale=True, desc=known.file, disable=None)
        with open(part, "ab" if have else "wb") as file, bar:
            got = 0
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                got += len(chunk)
        if got < length:
            raise ConnectionError(f"broke off after {have + got} of {have + length} bytes")
        return catcher.stated or _sha256(response.headers)


class _KeepHash(urllib.request.HTTPRedirectHandler):
    """Remembers the hash that the hub states before it redirects to its storage."""

    stated = ""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> Any:
        self.stated = self.stated or _sha256(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _sha256(headers: Any) -> str:
    value = (headers.get("X-Linked-Etag") or "").strip('"')
    return value if len(value) == 64 else ""


# -------------------------------------------------------------------------------------------------------- reading


def read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name: safetensors, or a pickle of tensors only.

    OpenAI's CLIP comes as TorchScript, which carries code: it is opened if its hash is OpenAI's own, and only read.

    Raises:
        StudyError: damaged, or with anything in it but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            if any(member.filename.endswith("/constants.pkl") for member in members):
                return _openai_weights(path, sha256)
            if sum(member.file_size for member in members) > path.stat().st_size:
                raise StudyError(f"{path} is refused: it is packed, which no checkpoint is; use the official file")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except StudyError:
        raise
    except SafetensorError as error:
        raise StudyError(f"{path} is damaged ({error}): delete it and fetch it again") from error
    except pickle.UnpicklingError as error:
        raise StudyError(
            f"{path} is refused: it holds more than tensors and could run code; use the official file"
        ) from error
    except Exception as error:  # damaged files make torch and zipfile raise nearly every kind
        raise StudyError(f"{path} cannot be read as weights: delete it and fetch it again") from error
    content = content.get("model", content) if isinstance(content, dict) else content  # SAM 2 keeps them one level down
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        for name, value in content.items()
    ):
        raise StudyError(f"{path} is not a table of tensors: use the official file")
    return content


def _openai_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    if sha256 != FILES["clip"].sha256:
        raise StudyError(f"{path} is TorchScript (which carries code) but not OpenAI's file: use that, or safetensors")
    weights = torch.jit.load(path, map_location="cpu").state_dict()
    sizes = ("input_resolution", "context_length", "vocab_size")
    return {key: value.float() for key, value in weights.items() if key not in sizes}
