"""A run of one notebook at one scale: its settings and places, and the results it leaves, each with its origin."""

import dataclasses
import datetime
import functools
import importlib.metadata
import io
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from matplotlib.figure import Figure
from PIL import Image

from samantics.cache import PROJECT, atomic_path, cache_dir, write_json, write_text
from samantics.errors import StudyError
from samantics.scales import Scale, get_scale

PACKAGES = (
    "torch", "torchvision", "transformers", "segment-anything", "sam2", "open-clip-torch", "scikit-learn",
    "pycocotools", "numpy", "matplotlib",
)  # fmt: skip
PIXELS_WIDE = 1400
NUMBERS = "%.6g"  # of a table's floats: more digits than any result has, few enough that reruns give equal bytes
SOURCES = ("lib", "notebooks", "pyproject.toml", "requirements.lock")  # what decides a result


@dataclasses.dataclass(frozen=True)
class Run:
    """One notebook at one scale."""

    scale: Scale  # its settings
    notebook: str  # its name, without ending
    seed: int  # of everything drawn at random
    figures: Path  # folder of this scale's figures and tables
    cache: Path  # folder of what this scale can compute again (`--fresh` empties it)
    device: str  # `cuda` or `cpu`
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # what `record` was told

    def record(self, key: str, value: Any) -> None:
        """Add a JSON-able fact, such as a weight or data hash, to the origin of every later file of the run.

        Raises:
            StudyError: another value was recorded under that name.
        """
        if self.facts.setdefault(key, value) != value:
            known = self.facts[key]
            raise StudyError(f"{self.notebook} recorded {key!r} as {known!r} and now as {value!r}: use two names")

    def save(self, figure: Figure | None, table: pd.DataFrame, name: str, caption: str = "") -> None:
        """Write a result: picture (`.png`, 1400 pixels wide), the numbers it shows (`.csv`), their origin (`.json`).

        Args:
            figure: None for a table without a picture.
            table: written without its index.
            name: file name without ending, beginning with the notebook's number: `01_probe_accuracy`.
            caption: one or two sentences that say what is shown, also to somebody who cannot see the picture.

        Raises:
            StudyError: the folder cannot be written or the disk is full; older files stay as they were.
        """
        path = self.figures / f"{name}.csv"
        if figure is not None:
            if self.scale.mark:
                figure.supxlabel(self.scale.mark, x=0.99, ha="right", fontsize=8, color="#B00020")
            drawn = io.BytesIO()
            figure.savefig(drawn, dpi=PIXELS_WIDE / figure.get_figwidth(), metadata={"Software": None})
            with atomic_path(path.with_suffix(".png")) as temporary:
                temporary.write_bytes(small_png(drawn.getvalue()))
        write_text(path, table.to_csv(index=False, float_format=NUMBERS))
        write_json(path.with_suffix(".json"), {"name": name, "caption": caption} | _origin(self))


def start_run(scale: str = "pocket", notebook: str = "", seed: int = 0) -> Run:
    """Begin a notebook: its settings, seeded torch, PyTorch limited to the cores at hand.

    Args:
        scale: name of a scale.
        notebook: its name, which every result's record holds.
        seed: of everything drawn at random.

    Returns:
        The run, which knows its settings, folders and device.

    Raises:
        StudyError: no such scale, or a seed out of range.
    """
    settings, device = get_scale(scale), "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(checked_seed(seed))
    torch.set_num_threads(available_cores())
    return Run(settings, notebook, seed, figures_dir() / settings.name, cache_dir() / settings.name, device)


def own_data(run: Run) -> Run:
    """The same run on the user's own data. Where the scale has data of its own, figures go beside the scale's."""
    return dataclasses.replace(run, figures=own_figures(run.scale.name))


def own_figures(scale: str) -> Path:
    """Folder of what a run on the user's own data leaves: the scale's at `paper`, which has no other data."""
    return figures_dir() / scale / ("own_data" if scale != "paper" else "")


def empty_own(figures: Path, pattern: str, given: Iterable[str]) -> None:
    """Remove what runs on other data left in their folder; StudyError where the files given now are part of it."""
    for path in given:
        if Path(path).resolve().is_relative_to(figures.resolve()):
            raise StudyError(f"{path} lies in a folder that a run on own data empties: copy it elsewhere")
    for old in figures.glob(pattern):
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)


def figures_dir() -> Path:
    """Folder of all results: ``$SAMANTICS_FIGURES``, else ``figures`` in the project."""
    return Path(os.environ.get("SAMANTICS_FIGURES") or PROJECT / "figures")


def small_png(png: bytes) -> bytes:
    """A picture in 256 colours: a third of its size as a file."""
    small = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(small, "PNG", optimize=True)
    return small.getvalue()


def checked_seed(seed: int) -> int:
    """The seed; StudyError where numpy, torch or scikit-learn would not take it (negative, over 32 bits)."""
    if not 0 <= seed < 2**32:
        raise StudyError(f"seed is {seed}: choose one from 0 to {2**32 - 1}")
    return seed


def available_cores() -> int:
    """Processor cores that this process may use: its affinity, further limited by ``$OMP_NUM_THREADS``."""
    cores, limit = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) > 0 else cores


def on_all_cores(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`function` of every job, in order. A probe or a pocket model is too small for several cores: each takes a job.

    Threads, because the work is in torch, which lets others run meanwhile; each computes on one core.

    Args:
        function: what is called.
        jobs: its arguments, call by call.

    Returns:
        What the calls return.
    """
    cores = available_cores()
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda job: function(*job), jobs))
    finally:
        torch.set_num_threads(cores)


def _origin(run: Run) -> dict[str, Any]:
    """All that is known of a run at this moment, as JSON-able values."""
    machine = {
        "device": torch.cuda.get_device_name() if run.device == "cuda" else "cpu",
        "processor": f"{platform.system()} {platform.machine()}",
        "cores": available_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    return {
        "notebook": run.notebook, "scale": run.scale.name, "mark": run.scale.mark, "seed": run.seed,
        "recorded": dict(run.facts), "git_revision": _git_revision(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(), "machine": machine,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _git_revision() -> str:
    """The commit of the project, with ``+changes`` when its sources differ from it; ``unknown`` outside git."""
    git = functools.partial(subprocess.check_output, cwd=PROJECT, stderr=subprocess.DEVNULL, text=True)
    try:
        changes = git(["git", "status", "--porcelain", "--", *SOURCES])
        return git(["git", "rev-parse", "HEAD"]).strip() + ("+changes" if changes.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
