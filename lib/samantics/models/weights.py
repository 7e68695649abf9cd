"""Official weight files: fetched once, resumed where they broke off, verified, read without running code of theirs."""

from __future__ import annotations

import csv
import dataclasses
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from samantics.cache import cache_dir, hash_file
from samantics.data import downloads
from samantics.errors import StudyError


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """One official file."""

    file: str  # name in the cache folder
    url: str  # its source; {hub} stands for $HF_ENDPOINT or the hub itself
    sha256: str  # empty where we could not learn it: then what the hub states is checked
    size: int  # megabytes, about; 0 where we could not learn it
    licence: str  # of the weights
    gated: bool = False  # wants an account that has accepted the licence

    @property
    def place(self) -> Path:
        """Where it is kept."""
        return cache_dir() / "weights" / self.file

    @property
    def within_reach(self) -> bool:
        """Whether it is there, or can be downloaded: a gated file needs a token."""
        return not self.gated or self.place.exists() or bool(huggingface_hub.get_token())

    @property
    def gate(self) -> str:
        """What to do for a gated file, as the hub says it."""
        page = self.url.split("/resolve/")[0].replace("{hub}", "https://huggingface.co")
        return (
            f"{page} is gated: accept its licence there and log in (hf auth login, or HF_TOKEN), "
            f"or put the file at {self.place}"
        )


OFFICIAL = {  # by encoder
    row.pop("encoder"): WeightFile(**row | {"size": int(row["size"]), "gated": row["gated"] == "yes"})
    for row in csv.DictReader((Path(__file__).parents[1] / "assets" / "weights.csv").read_text().splitlines())
}
OPENAI_CLIP = OFFICIAL["clip"].sha256


def weight_file(known: WeightFile, path: Path | str | None = None) -> tuple[Path, str]:
    """The path given, else the file in the cache folder, else it is downloaded there; and its SHA-256."""
    if path is not None:
        if not os.path.isfile(path):
            raise StudyError(f"{path} does not exist: give the path of {known.file}")
        return Path(path), hash_file(path)
    place = known.place
    if not place.exists():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{place}.lock").acquire()
        except OSError as error:
            raise StudyError(f"cannot write {place.parent}: make it writable or set SAMANTICS_CACHE") from error
        with lock:  # of the one process that downloads; the others wait, and find the file
            if not place.exists():
                return place, download(known, place)
    found = hash_file(place)
    if known.sha256 not in ("", found):
        hashes = f"SHA-256 {found[:12]}, expected {known.sha256[:12]}"
        raise StudyError(f"{place} is damaged ({hashes}): delete it to download it again")
    return place, found


# ---------------------------------------------------------------------------------------------------- downloading


def download(known: WeightFile, place: Path) -> str:
    """Fetch a file to `place` (see `samantics.data.downloads.download`); returns its verified SHA-256."""
    url, headers = _request(known)
    expected = known.sha256 or (lambda: _hash_on_hub(url, headers))
    return downloads.download(url, place, expected, headers=headers, forbidden=known.gate if known.gated else "")


def _request(known: WeightFile) -> tuple[str, dict[str, str]]:
    """Address and headers; the token goes to the hub only."""
    hub, token = os.environ.get("HF_ENDPOINT") or "https://huggingface.co", os.environ.get("HF_TOKEN", "").strip()
    if not hub.startswith(("https://", "http://")):
        raise StudyError(f"HF_ENDPOINT is {hub!r}, which is no address: begin it with https://, or unset it")
    if not (token.isascii() and token.isprintable()):
        raise StudyError("HF_TOKEN has characters that no token has: set it again")
    headers: dict[str, str] = {}
    if known.url.startswith("{hub}") and (token := huggingface_hub.get_token() or ""):
        headers["Authorization"] = f"Bearer {token}"
    return known.url.replace("{hub}", hub.rstrip("/")), headers


def _hash_on_hub(url: str, headers: dict[str, str]) -> str:
    """The SHA-256 that the hub states of a file, or nothing."""
    found = huggingface_hub.get_hf_file_metadata(url, token=False, headers=headers, timeout=downloads.TIMEOUT)
    return found.etag if found.etag and len(found.etag) == 64 else ""


# -------------------------------------------------------------------------------------------------------- reading


def read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name: safetensors, or a pickle of tensors only.

    OpenAI's CLIP comes as TorchScript, which carries code: it is opened if its hash is OpenAI's own, and only read.
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
        why = "it holds more than tensors and could run code; use the official file"
        raise StudyError(f"{path} is refused: {why}") from error
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
    if sha256 != OPENAI_CLIP:
        raise StudyError(f"{path} is TorchScript (which carries code) but not OpenAI's file: use that, or safetensors")
    weights = torch.jit.load(path, map_location="cpu").state_dict()
    sizes = ("input_resolution", "context_length", "vocab_size")
    return {key: value.float() for key, value in weights.items() if key not in sizes}


def filled(model: Any, weights: dict[str, Tensor], prefix: str, name: str, path: Path) -> nn.Module:
    """The official model with these weights; StudyError where some are lacking or have another shape."""
    if prefix and any(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if hasattr(model, "from_pretrained"):  # transformers renames what older checkpoints call differently
        model, wrong = _from_pretrained(model, weights)
    else:
        own = model.state_dict()
        wrong = [key for key, value in own.items() if key not in weights or weights[key].shape != value.shape]
        wrong += [key for key in weights if key not in own]
        if not wrong:
            model.load_state_dict(weights)
    if wrong:
        raise StudyError(
            f"{path} is not a checkpoint of the official {name} ({sorted(wrong)[0]} differs): use its own file"
        )
    return model


def _from_pretrained(model: Any, weights: dict[str, Tensor]) -> tuple[Any, list[str]]:
    """The model filled by transformers, which prints nothing of decoders that are left out; and what it lacks."""
    from transformers.utils import logging

    options = {"add_pooling_layer": False} if type(model).__name__ == "HieraModel" else {}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, report = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=weights,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused by the caller in a line of our own
            **options,
        )
    finally:
        logging.set_verbosity(verbosity)
    return model, [*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])]
