"""Runs the study's notebooks, each in a kernel of its own by papermill; leaves figures, tables, pages and a report."""

from __future__ import annotations

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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import nbformat
import pandas as pd
import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from PIL import Image

from plan import prepare
from report import notebook_page, write_report
from samantics.cache import PROJECT, atomic_path, cache_dir, remove_leftovers
from samantics.errors import StudyError
from samantics.run import available_cores, checked_seed, empty_own, few_colours, figures_dir, own_figures
from samantics.scales import get_scale

NOTEBOOKS = PROJECT / "notebooks"
NUMBERED = re.compile(r"[0-9A-Z][0-9]_\w+")
OWN_DATA = ("data", "references", "targets", "images", "target_images")  # the options that name files of the user's own
KERNEL = (
    "--log-level=40",  # its warning about its transport is no news to a reader
    # packages of models make millions of objects that stay: looking for garbage among them takes a fifth of importing
    "--IPKernelApp.exec_lines=import gc; gc.set_threshold(50_000)",
)
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
    """Run the numbered notebooks in order; a failing one does not stop the others.

    Args:
        scale: name of a scale.
        only: numbers or names of notebooks; when empty the scale's, or 05 where the user's own data is given (which at
            `paper` is the scale's data).
        fresh: empty the scale's cache first.
        parameters: values for those parameters that a notebook has; each must be known to one notebook at least.
    """
    usual = get_scale(scale).notebooks
    given = checked(parameters or {})
    own = {name: Path(given[name]).name for name in OWN_DATA if name in given}
    chosen = only or (["05"] if own and scale != "paper" else usual)
    values = {path: parameter_names(path) for path in select_notebooks(chosen)}
    if unknown := given.keys() - set().union(*values.values()):
        option = min(unknown).replace("_", "-")
        raise StudyError(f"no notebook of this run takes --{option}: leave it out, or choose others by --only")
    _check_folders()
    outcomes, pages = [], []
    with only_run(scale), kernel_environment(), ThreadPoolExecutor(1) as aside:  # pages are made beside the next kernel
        if fresh:
            shutil.rmtree(cache_dir() / scale, ignore_errors=True)
        for folder in (figures_dir() / scale, cache_dir() / scale):
            remove_leftovers(folder, "**/.*")
        prepare(scale, [path.stem.split("_")[0] for path in values], given)
        if own and own_figures(scale) != figures_dir() / scale:  # whose results would stand beside these
            empty_own(own_figures(scale), "*", [given[name] for name in own])
        for path, names in values.items():
            mine = ", ".join(own[name] for name in own if name in names)
            figures = (own_figures(scale) if mine else figures_dir() / scale).resolve()
            known = {name: value for name, value in {"scale": scale, **given}.items() if name in names}
            outcomes.append(dataclasses.replace(execute(path, figures, known), data=mine))
            print(_row(outcomes[-1]), flush=True)
            save_outcomes(figures, outcomes[-1:])
            pages.append(aside.submit(write_pages, figures, path.name))
    print(*(f"report: {report}" for report in dict.fromkeys(page.result() for page in pages)), sep="\n")
    return outcomes


def _check_folders() -> None:
    for variable, place in (("SAMANTICS_FIGURES", figures_dir()), ("SAMANTICS_CACHE", cache_dir())):
        if place.exists() and not place.is_dir():
            raise StudyError(f"{place} is a file and cannot hold results: let {variable} name a folder")


def checked(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as notebooks take them, paths absolute; StudyError for a path or seed that cannot be."""
    checked_seed(parameters.get("seed", 0))
    values = dict(parameters)
    for name in values.keys() & set(OWN_DATA):
        if not os.path.exists(values[name]):  # nor does a name that is too long for a file
            raise StudyError(f"--{name} {values[name]} does not exist: check the path")
        values[name] = str(Path(values[name]).resolve())
    return values


def select_notebooks(only: Sequence[str] = ()) -> list[Path]:
    """The numbered notebooks (`00_...` to `99_...`, then appendices `A1_...`), sorted; those that `only` names."""
    paths = sorted(path for path in NOTEBOOKS.glob("*.ipynb") if NUMBERED.fullmatch(path.stem))
    if not paths:
        raise StudyError(f"{NOTEBOOKS} has no numbered notebook: restore it with git checkout")
    names = {path: {path.stem, path.stem.split("_")[0], path.name} for path in paths}
    if unknown := [name for name in only if not any(name in known for known in names.values())]:
        raise StudyError(f"no notebook is called {unknown[0]!r}: choose from {', '.join(path.stem for path in paths)}")
    return [path for path in paths if not only or names[path].intersection(only)]


def parameter_names(path: Path) -> set[str]:
    """Names that the notebook's cell tagged `parameters` assigns."""
    try:
        return set(papermill.inspect_notebook(path))
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): restore it with git checkout") from error
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
        with atomic_path(folder / path.name) as temporary:
            nbformat.write(notebook, temporary)
    return folder


@contextlib.contextmanager
def only_run(scale: str) -> Iterator[None]:
    """Hold the one place of a run at this scale; StudyError where another process holds it."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(cache_dir() / f"{scale}.lock", timeout=0):
            yield
    except filelock.Timeout as error:
        raise StudyError(f"another run at scale {scale} is under way ({error.lock_file}): wait for its end") from error


@contextlib.contextmanager
def kernel_environment() -> Iterator[None]:
    """Kernels inherit: the same folders, as many threads as there are cores, and no debugger's warning."""
    before, cores = dict(os.environ), str(available_cores())
    # relative ones would be others there: kernels work in the notebooks' folder
    os.environ.update(SAMANTICS_FIGURES=str(figures_dir().resolve()), SAMANTICS_CACHE=str(cache_dir().resolve()))
    os.environ.update(OMP_NUM_THREADS=cores, MKL_NUM_THREADS=cores, OPENBLAS_NUM_THREADS=cores)
    os.environ.update(PYDEVD_DISABLE_FILE_VALIDATION="1", JUPYTER_PREFER_ENV_PATH="1", TOKENIZERS_PARALLELISM="false")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def save_outcomes(figures: Path, outcomes: Sequence[Outcome]) -> None:
    """Write `run.csv`: the newest outcome of every notebook of this scale, in order."""
    path, table = figures / "run.csv", pd.DataFrame(outcomes)
    if path.is_file():
        earlier = pd.read_csv(path, keep_default_na=False)
        table = pd.concat([earlier[~earlier["notebook"].isin(table["notebook"])], table])
    with atomic_path(path) as temporary:
        table.sort_values("notebook").to_csv(temporary, index=False)


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
            papermill.execute_notebook(
                path,
                temporary,
                dict(parameters),
                kernel_name="python3",
                language="python",
                progress_bar=bar,
                stderr_file=Bars(),
                cwd=path.parent,
                start_timeout=10**6,  # seconds of a clock that may jump by days; a kernel that dies is noticed anyway
                shutdown_kernel="immediate",  # a kernel with torch takes 1.6 s to take itself apart
                coalesce_streams=True,
                extra_arguments=list(KERNEL),
            )
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
    with atomic_path(executed.with_suffix(".html")) as temporary:
        temporary.write_text(notebook_page(nbformat.read(executed, as_version=4), executed.stem), encoding="utf-8")
    return write_report(figures)


class Bars:
    """Shows on the terminal the bars of a kernel, which name the image at work, and nothing else of its stderr."""

    last = 0.0

    def write(self, text: str) -> None:
        """Pass text on if it draws bars; where nobody watches, a line every ten seconds."""
        if "\r" in text and sys.stderr.isatty():
            sys.stderr.write(text)
        elif (line := text.strip().split("\r")[-1]) and "\r" in text and time.monotonic() > self.last + 10:
            self.last = time.monotonic()
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        """What papermill asks for after each text."""
        sys.stderr.flush()


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
                small = io.BytesIO()
                with Image.open(io.BytesIO(base64.b64decode(png))) as drawn:
                    few_colours(drawn).save(small, "PNG", optimize=True)
                output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
        cell.get("outputs", [])[:] = [
            out for out in cell.get("outputs", []) if out.get("text", "x").strip() and WIDGET not in out.get("data", {})
        ]
    text = nbformat.writes(notebook).replace(f"{figures_dir()}/", "figures/").replace(f"{PROJECT}/", "")
    path.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def peak_memory(interval: float = 1.0) -> Iterator[list[int]]:
    """A list to which the memory of this process's children (bytes) is added every `interval` seconds."""
    samples, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(interval):
            samples.append(children_memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def children_memory() -> int:
    """Bytes that all processes started by this one hold together; pages that they share count once."""
    processes, total = psutil.Process().children(recursive=True), 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            # the kernel walks all pages of a process to find what it shares: not when there is nobody to share with
            total += process.memory_info().rss if len(processes) == 1 else process.memory_full_info().pss
    return total
