"""Official weight files: fetched once, resumed where they broke off, verified, read without running code of theirs."""

import csv
import dataclasses
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers as hf
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from samantics.cache import ASSETS, cache_dir, hash_file
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
        how = "accept its licence there and log in (hf auth login, or HF_TOKEN)"
        return f"{page} is gated: {how}, or put the file at {self.place}" if self.gated else ""


OFFICIAL = {  # by encoder
    row.pop("encoder"): WeightFile(**row | {"size": int(row["size"]), "gated": row["gated"] == "yes"})
    for row in csv.DictReader((ASSETS / "weights.csv").read_text().splitlines())
}
OPENAI_CLIP = OFFICIAL["clip"].sha256


def weight_file(known: WeightFile) -> tuple[Path, str]:
    """The file in the cache folder, downloaded where it is missing; and its verified SHA-256."""
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


def download(known: WeightFile, place: Path) -> str:
    """Fetch a file to `place` (see `downloads.download`); returns its SHA-256. The token goes to the hub only."""
    hub, token = os.environ.get("HF_ENDPOINT") or "https://huggingface.co", os.environ.get("HF_TOKEN", "").strip()
    if not hub.startswith(("https://", "http://")):
        raise StudyError(f"HF_ENDPOINT is {hub!r}, which is no address: begin it with https://, or unset it")
    if not (token.isascii() and token.isprintable()):
        raise StudyError("HF_TOKEN has characters that no token has: set it again")
    url, secret = known.url.replace("{hub}", hub.rstrip("/")), huggingface_hub.get_token()
    headers = {"Authorization": f"Bearer {secret}"} if secret and known.url.startswith("{hub}") else {}

    def stated() -> str:
        found = huggingface_hub.get_hf_file_metadata(url, token=False, headers=headers, timeout=downloads.TIMEOUT)
        return found.etag if found.etag and len(found.etag) == 64 else ""

    return downloads.download(url, place, known.sha256 or stated, headers=headers, forbidden=known.gate)


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
    weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)} or weights
    if isinstance(model, hf.PreTrainedModel):  # transformers renames what older checkpoints call differently
        hf.logging.set_verbosity_error()  # else it prints a table of decoders that are left out
        options = {"add_pooling_layer": False} if isinstance(model, hf.HieraModel) else {}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, in one line
        model, report = type(model).from_pretrained(None, config=model.config, state_dict=weights, **options)
        wrong = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    else:
        own, given = ({(key, value.shape) for key, value in some.items()} for some in (model.state_dict(), weights))
        wrong = [key for key, _ in own ^ given]
        if not wrong:
            model.load_state_dict(weights)
    if wrong:
        problem = f"is not a checkpoint of the official {name} ({min(wrong)} differs): use its own file"
        raise StudyError(f"{path} {problem}")
    return model
