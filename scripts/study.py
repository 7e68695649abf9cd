"""Runs the study's notebooks, each in a kernel of its own by papermill; leaves figures, tables, pages and a report."""

import base64
import contextlib
import dataclasses
import datetime
import io
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import filelock
import nbformat
import pandas as pd
import papermill
import psutil
from nbclient.exceptions import DeadKernelError

from report import notebook_page, write_report
from samantics.cache import PROJECT, atomic_path, cache_dir, remove_leftovers, write_text
from samantics.data.classification import scale_data
from samantics.data.detection import load_data
from samantics.errors import StudyError
from samantics.models.encoder import within_reach
from samantics.models.weights import OFFICIAL, weight_file
from samantics.run import available_cores, checked_seed, empty_own, figures_dir, own_figures, small_png, start_run
from samantics.scales import BESIDE_SAM, get_scale

NOTEBOOKS = PROJECT / "notebooks"
NUMBERED = re.compile(r"[0-9A-Z][0-9]_\w+")
OWN_DATA = ("data", "references", "targets", "images", "target_images")  # the options that name files of the user's own
EXECUTION: dict[str, Any] = {
    "kernel_name": "python3", "language": "python", "coalesce_streams": True,
    "start_timeout": 10**6,  # seconds of a clock that may jump by days; a kernel that dies is noticed anyway
    "shutdown_kernel": "immediate",  # a kernel with torch takes 1.6 s to take itself apart
    "extra_arguments": [
        "--log-level=40",  # its warning about its transport is no news to a reader
        # packages of models make millions of objects that stay: searching them for garbage takes a fifth of importing
        "--IPKernelApp.exec_lines=import gc; gc.set_threshold(50_000)",
    ],
}  # fmt: skip
WIDGET = "application/vnd.jupyter.widget-view+json"  # a bar, or what a reader moves: nothing without a kernel
BAR = re.compile(r"[^\r\n]*\d+%\|[^\r\n]*|\x1b\[A")  # a line of a progress bar, and the way back up to it
logging.getLogger("papermill").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one notebook."""

    notebook: str
    seconds: float  # from kernel start to end
    peak_gib: float  # most memory that its kernel and the kernel's children held together
    figures: int  # pictures that it left
    error: str = ""  # one line that says where and why it stopped; empty when it ran to its end
    data: str = ""  # names of the user's own files, where it ran on them
    started: str = ""  # time in UTC: results that are older are of an earlier run


def run_study(
    scale: str, only: Sequence[str] = (), fresh: bool = False, parameters: Mapping[str, Any] | None = None
) -> list[Outcome]:
    """Run those of `only`, else the scale's, in order, with the parameters that each takes; one that fails stops none.

    Own data is notebook 05's where none is named; at `paper` it is the scale's data. `fresh` empties the scale's cache.
    """
    usual, given = get_scale(scale).notebooks, checked(parameters or {})
    own = {name: Path(given[name]).name for name in OWN_DATA if name in given}
    chosen = only or (["05"] if own and scale != "paper" else usual)
    values = {path: parameter_names(path) for path in select_notebooks(chosen)}
    if unknown := given.keys() - set().union(*values.values()):
        option = min(unknown).replace("_", "-")
        raise StudyError(f"no notebook of this run takes --{option}: leave it out, or choose others by --only")
    outcomes, pages = [], []
    environment = mock.patch.dict(os.environ, kernel_environment())
    with only_run(scale), environment, ThreadPoolExecutor(1) as aside:  # pages are made beside the next kernel
        if fresh:
            shutil.rmtree(cache_dir() / scale, ignore_errors=True)
        for folder in (figures_dir() / scale, cache_dir() / scale):
            remove_leftovers(folder)
        prepare(scale, [path.stem.split("_")[0] for path in values], given)
        if own and scale != "paper":  # results of other data would stand beside these
            empty_own(own_figures(scale), "*", [given[name] for name in own])
        for path, names in values.items():
            mine = ", ".join(own[name] for name in own if name in names)
            figures = (own_figures(scale) if mine else figures_dir() / scale).resolve()
            known = {name: value for name, value in {"scale": scale, **given}.items() if name in names}
            outcomes.append(outcome := dataclasses.replace(execute(path, figures, known), data=mine))
            print(_row(outcome), flush=True)
            save_outcome(figures, outcome)
            pages.append(aside.submit(write_pages, figures, path.name))
    print(*(f"report: {report}" for report in dict.fromkeys(page.result() for page in pages)), sep="\n")
    return outcomes


def checked(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as notebooks take them, paths absolute; StudyError for a path, seed or folder that cannot be."""
    checked_seed(parameters.get("seed", 0))
    values = dict(parameters)
    for name in [name for name in OWN_DATA if name in values]:
        if not os.path.exists(values[name]):  # nor does a name that is too long for a file
            raise StudyError(f"--{name.replace('_', '-')} {values[name]} does not exist: check the path")
        values[name] = str(Path(values[name]).resolve())
    for variable, place in (("SAMANTICS_FIGURES", figures_dir()), ("SAMANTICS_CACHE", cache_dir())):
        if place.exists() and not place.is_dir():
            raise StudyError(f"{place} is a file and cannot hold results: let {variable} name a folder")
    return values


def select_notebooks(only: Sequence[str] = ()) -> list[Path]:
    """The numbered notebooks (`00_...` to `99_...`, then appendices `A1_...`), sorted; those that `only` names."""
    paths = sorted(path for path in NOTEBOOKS.glob("*.ipynb") if NUMBERED.fullmatch(path.stem))
    names = {path: {path.stem, path.stem.split("_")[0], path.name} for path in paths}
    if unknown := [name for name in only if not any(name in known for known in names.values())]:
        raise StudyError(f"no notebook is called {unknown[0]!r}: choose from {', '.join(path.stem for path in paths)}")
    return [path for path in paths if not only or names[path].intersection(only)]


def parameter_names(path: Path) -> set[str]:
    """Names that the notebook's cell tagged `parameters` assigns."""
    try:
        return set(papermill.inspect_notebook(path))
    except Exception as error:  # what is no notebook makes nbformat raise nearly every kind
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise StudyError(f"{path} is damaged ({reason}): restore it with git checkout") from error


def write_student_notebooks(only: Sequence[str] = (), folder: Path = PROJECT / "student") -> Path:
    """Write the notebooks with an empty cell in place of each that is tagged `solution`; the folder."""
    for path in select_notebooks(only):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if "solution" in cell.metadata.get("tags", []):
                cell.source = "# Your answer\n"
        write_text(folder / path.name, nbformat.writes(notebook) + "\n")
    return folder


def only_run(scale: str) -> contextlib.AbstractContextManager[Any]:
    """Hold the one place of a run at this scale, until the block ends; StudyError where another process holds it."""
    try:
        return filelock.FileLock(cache_dir() / f"{scale}.lock").acquire(timeout=0)
    except filelock.Timeout as error:
        raise StudyError(f"another run at scale {scale} is under way ({error.lock_file}): wait for its end") from error


def kernel_environment() -> dict[str, str]:
    """What kernels inherit: the same folders, as many threads as there are cores, and no debugger's warning."""
    # relative folders would be others there: kernels work in the notebooks' folder
    folders = {"SAMANTICS_FIGURES": str(figures_dir().resolve()), "SAMANTICS_CACHE": str(cache_dir().resolve())}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(available_cores()))
    quiet = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "TOKENIZERS_PARALLELISM": "false", "JUPYTER_PREFER_ENV_PATH": "1"}
    return folders | threads | quiet


def save_outcome(figures: Path, outcome: Outcome) -> None:
    """Put a notebook's newest outcome into `run.csv`, which is ordered by name."""
    path, table = figures / "run.csv", pd.DataFrame([outcome])
    if path.is_file():
        earlier = pd.read_csv(path, keep_default_na=False)
        table = pd.concat([earlier[earlier["notebook"] != outcome.notebook], table])
    write_text(path, table.sort_values("notebook").to_csv(index=False))


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table that ends a run, and below it what failed."""
    lines = ["", f"{'notebook':<28}{'seconds':>9}{'peak memory':>14}{'figures':>9}", *map(_row, outcomes)]
    return "\n".join([*lines, *(f"error: {outcome.error}" for outcome in outcomes if outcome.error)])


def _row(outcome: Outcome) -> str:
    end = "  failed" if outcome.error else ""
    return f"{outcome.notebook:<28}{outcome.seconds:>9.1f}{outcome.peak_gib:>10.2f} GiB{outcome.figures:>9}{end}"


def execute(path: Path, figures: Path, parameters: Mapping[str, Any]) -> Outcome:
    """Run one notebook; leave it with its outputs in `figures/notebooks`, also when it fails."""
    target, error = figures / "notebooks" / path.name, ""
    before, started, date = _pictures(figures, path), time.monotonic(), datetime.datetime.now(datetime.UTC)
    bar = {"desc": path.stem, "delay": 5, "leave": False, "mininterval": 0.1 if sys.stderr.isatty() else 10}
    with peak_memory() as peak, atomic_path(target) as temporary:
        try:
            options = EXECUTION | {"progress_bar": bar, "stderr_file": Bars(), "cwd": path.parent}
            papermill.execute_notebook(path, temporary, dict(parameters), **options)
        except papermill.PapermillExecutionError as failure:
            error = f"{path.stem} stopped in cell [{failure.exec_count}]: {_reason(failure)}"
        except DeadKernelError:
            cells = [cell for cell in nbformat.read(temporary, as_version=4).cells if cell.cell_type == "code"]
            begun = sum(cell.metadata.papermill.start_time is not None for cell in cells)
            error = f"{path.stem}: its kernel died in cell {begun} of {len(cells)}, as when memory runs out"
        clean_notebook(temporary)
    left, seconds = _pictures(figures, path) - before, round(time.monotonic() - started, 1)
    gib, when = round(max(peak) / 2**30, 2), date.isoformat(timespec="seconds")
    return Outcome(path.stem, seconds, gib, len(left), error, started=when)


def write_pages(figures: Path, notebook: str) -> Path:
    """The page of an executed notebook, and the report that leads to it."""
    executed = figures / "notebooks" / notebook
    write_text(executed.with_suffix(".html"), notebook_page(nbformat.read(executed, as_version=4), executed.stem))
    return write_report(figures)


class Bars(io.StringIO):
    """Shows on the terminal the bars of a kernel, which name the image at work, and nothing else of its stderr."""

    last = 0.0

    def write(self, text: str) -> int:
        """Pass text on if it draws bars; where nobody watches, a line every ten seconds."""
        line, now = text.strip().split("\r")[-1], time.monotonic()
        if "\r" in text and sys.stderr.isatty():
            sys.stderr.write(text)
        elif "\r" in text and line and now > self.last + 10:
            self.last = now
            sys.stderr.write(f"{line}\n")
        return len(text)


def _pictures(figures: Path, notebook: Path) -> set[tuple[str, int, int]]:
    """A notebook's pictures, each with what changes when it is written again (the clock may go back meanwhile)."""
    states = [(picture.name, picture.stat()) for picture in figures.glob(f"{notebook.stem[:2]}*.png")]
    return {(name, state.st_ino, state.st_mtime_ns) for name, state in states}


def _reason(failure: papermill.PapermillExecutionError) -> str:
    """A user's error as its own line; any other with its kind and the line of the cell where it arose."""
    message = " ".join(failure.evalue.split())
    if failure.ename == "StudyError":
        return message
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(failure.traceback))
    arrows = re.findall(r"^-+> *\d+ (.*)$", plain, flags=re.MULTILINE)
    place = f" at `{arrows[0].strip()}`" if arrows else ""
    return f"{failure.ename}: {message}{place}"


def clean_notebook(path: Path) -> None:
    """Take out of an executed notebook what differs between reruns (times, the project's own path), bars and widgets.

    Its pictures are kept in 256 colours: a third of their size.
    """
    notebook = nbformat.read(path, as_version=4)
    for part in ("papermill", "widgets"):
        notebook.metadata.pop(part, None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"  # papermill draws one at random
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                output.text = BAR.sub("", output.text)
            if png := output.get("data", {}).get("image/png"):
                output.data["image/png"] = base64.b64encode(small_png(base64.b64decode(png))).decode()
        cell.get("outputs", [])[:] = [
            out for out in cell.get("outputs", []) if out.get("text", "x").strip() and WIDGET not in out.get("data", {})
        ]
    text = nbformat.writes(notebook).replace(f"{figures_dir()}/", "figures/").replace(f"{PROJECT}/", "")
    path.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list to which the memory of this process's children (bytes) is added every second."""
    samples, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            samples.append(children_memory())

    with ThreadPoolExecutor(1) as aside:
        aside.submit(watch)
        try:
            yield samples
        finally:
            over.set()


def children_memory() -> int:
    """Bytes that all processes started by this one hold together; pages that they share count once."""
    processes, total = psutil.Process().children(recursive=True), 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            # the kernel walks all pages of a process to find what it shares: not when there is nobody to share with
            total += process.memory_info().rss if len(processes) == 1 else process.memory_full_info().pss
    return total


# ---------------------------------------------------------------------------- what `lite` and `paper` need

OPTIONS = {  # of a user who has the data
    "data": "--data DIR (ImageNet-1k: train/ and val/ inside)",
    "references": "--references FILE --targets FILE --images DIR (COCO 2017)",
}
NEEDED = {  # where an option is not given: what, MB to fetch when nothing is there, MB on disk afterwards
    "lite": {
        "data": [("Imagenette, 320 pixels", 342, 690)],
        "references": [("COCO val2017, annotations", 253, 30), ("COCO val2017, about 1,500 images", 244, 244)],
        "results": [("features and results (estimated)", 0, 10_000)],
    },
    "paper": {
        "data": [("ImageNet-1k, yours (--data)", 0, 0)],
        "references": [("COCO 2017, yours (--references, ...)", 0, 0)],
        "results": [("features and results (estimated)", 0, 300_000)],
    },
}
HOURS = {  # ESTIMATED (docs/speed.md): on one H100, on two processor cores; without SAM 3
    "lite": {"01": (1, 35), "02": (3, 200), "03": (1, 12), "04": (0.1, 0.1)},
    "paper": {"01": (20, 3000), "02": (120, 20_000), "03": (10, 120), "04": (0.1, 0.1)},
}


def prepare(name: str, notebooks: Collection[str], given: Mapping[str, Any]) -> None:
    """Print the plan of a run, then fetch what it needs; a scale that needs nothing prints nothing.

    StudyError for `paper` without the user's folders, and where something cannot be fetched or used.
    """
    scale = get_scale(name)
    if scale.weights != "official":
        return
    wanted = {"01": scale.encoders, "02": ("sam", *BESIDE_SAM), "03": scale.pipeline.sources}
    known = dict.fromkeys(name for number in notebooks for name in wanted.get(number, ()) if name != "random")
    official = tuple(known) if given.get("weights", "official") == "official" else ()
    names = within_reach(official, "official")
    asked = {"data": "01" in notebooks, "references": not {"02", "03"}.isdisjoint(notebooks)}
    missing = [option for option in asked if asked[option] and option not in given]
    files = {encoder: OFFICIAL[encoder] for encoder in names}
    rows = [(f"weights of {encoder}", file.size, file.size) for encoder, file in files.items()]
    rows += [row for option in [*missing, "results"] for row in NEEDED[name][option]]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    print(f"scale {name} fetches what is not there yet (into {cache_dir()}) and computes the rest:")
    print(pd.DataFrame(rows, columns=["what", "MB to fetch", "MB on disk"]).to_string(index=False), end="\n\n")
    for gated in [encoder for encoder in official if encoder not in names]:
        print(f"without {gated}: {OFFICIAL[gated].gate}")
    times = [(number, *HOURS[name][number]) for number in notebooks if number in HOURS[name]]
    hours = pd.DataFrame(times, columns=["notebook", "hours on one H100 (estimated)", "on two cores (estimated)"])
    print(hours.to_string(index=False, float_format="{:g}".format), end="\n\n", flush=True)
    if name == "paper" and missing:
        lacking = " and ".join(OPTIONS[option] for option in missing)
        raise StudyError(f"scale paper needs {lacking}: name them, or choose --scale lite")
    for file in files.values():
        weight_file(file)
    run = start_run(name)
    if asked["data"]:
        scale_data(run, given.get("data", ""))
    if asked["references"]:
        load_data(run, **{key: given.get(key, "") for key in ("references", "targets", "images")})
