"""One file from a server: fetched once, resumed where it broke off, verified; or one line that says what to do."""

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pooch
from tqdm.auto import tqdm

from samantics.cache import FULL
from samantics.errors import StudyError

TRIES = 5
WAIT = 1.0  # seconds before the second try; doubled each time
TIMEOUT = 30.0  # seconds without a byte
LARGE = 10_000_000  # bytes; smaller files get no progress bar of their own


def download(
    url: str, place: Path, expected: str | Callable[[], str] = "", algorithm: str = "sha256",
    headers: Mapping[str, str] | None = None, forbidden: str = "",
) -> str:  # fmt: skip
    """Fetch a file to `place`, going on with the `.part` of an earlier try; returns its verified hash.

    The hub's client opens connections and follows redirects, pooch hashes. Going on after a kill or a full disk stays
    own code: `hf_hub_download` (huggingface_hub 2.4) and `pooch.retrieve` (1.9) begin anew, and leave their temporary
    file behind. `expected` is the hash, or asks for it; without one an MD5 that the server states as ETag is checked.
    """
    part, sent = place.with_name(place.name + ".part"), {"User-Agent": "samantics", "Accept-Encoding": "identity"}
    wanted = ""
    for attempt in range(TRIES):
        try:
            wanted = expected() if callable(expected) else expected
            stated = _fetch_rest(url, sent | dict(headers or {}), part)
            wanted = wanted or (stated if algorithm == "md5" else "")
            break
        except Exception as error:  # the client's HTTP package has errors of its own
            problem = _why_final(error, url, place, forbidden, attempt == TRIES - 1)
            if problem:
                raise StudyError(problem) from error
        time.sleep(WAIT * 2**attempt)
    found: str = pooch.file_hash(str(part), algorithm)
    if wanted not in ("", found):
        part.unlink()
        name = {"sha256": "SHA-256", "md5": "MD5"}[algorithm]
        raise StudyError(
            f"{url} sent another file ({name} {found[:12]}, not {wanted[:12]}): run again, or put it at {place}"
        )
    os.replace(part, place)
    return found


def _fetch_rest(url: str, headers: dict[str, str], part: Path) -> str:
    """Append what is missing to `part`; the MD5 that the server states of the whole, or nothing."""
    have = part.stat().st_size if part.exists() else 0
    session = huggingface_hub.get_session()
    with session.stream("GET", url, headers=headers | {"Range": f"bytes={have}-"}, timeout=TIMEOUT) as response:
        if response.status_code == 416 and have:
            return ""  # nothing is missing, or the part is of another file: the hash will tell
        huggingface_hub.hf_raise_for_status(response)
        if response.status_code != 206:
            have = 0  # the server starts at the beginning
        total = have + int(response.headers.get("Content-Length") or 0)
        quiet = True if total < LARGE else None
        bar = tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=quiet)
        with open(part, "ab" if have else "wb") as file, bar:
            for chunk in response.iter_raw():
                file.write(chunk)
                bar.update(len(chunk))
        etag = str(response.headers.get("ETag", "")).strip('"')
        return etag if re.fullmatch(r"[0-9a-f]{32}", etag) else ""  # S3's of a file that was uploaded in one piece


def _why_final(error: Exception, url: str, place: Path, forbidden: str, last: bool) -> str:
    """What to tell the user where trying again is of no use, else nothing."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in (401, 403) and forbidden:
        return forbidden
    if 400 <= status < 500 and status not in (408, 429):
        return f"{url} answers {status}: fetch {place.name} elsewhere and put it at {place}"
    if getattr(error, "errno", None) in FULL:
        return f"no space left while writing {place}.part: free some space and run again"
    why = " ".join(str(error).split()) or type(error).__name__  # may hold what a server sent in place of a status line
    return f"cannot download {place.name} ({why}): go online, or fetch {url} elsewhere and put it at {place}" * last


def archive(url: str, md5: str, folder: Path) -> Path:
    """The verified archive in the folder: there already, or fetched."""
    place = folder / url.rsplit("/", 1)[-1]
    if not place.is_file():
        download(address(url), place, md5, "md5")
    elif pooch.file_hash(str(place), "md5") != md5:
        raise StudyError(f"{place} is not {url} (another MD5): delete it to download it again")
    return place


def address(url: str) -> str:
    """The address, or the same path on the server that `SAMANTICS_MIRROR` names."""
    mirror = os.environ.get("SAMANTICS_MIRROR", "").rstrip("/")
    if mirror and not mirror.startswith(("https://", "http://")):
        raise StudyError(f"SAMANTICS_MIRROR is {mirror!r}, which is no address: begin it with https://, or unset it")
    return mirror + urlsplit(url).path if mirror else url
