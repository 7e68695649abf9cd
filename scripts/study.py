"""Does SAM know what it segments? Runs the study's notebooks and leaves figures, tables and a report.

Usage: ./run_all.sh [options]

  --scale NAME        pocket (default; two cores, no network), lite or paper
  --only NAME ...     these notebooks only, by number or name: --only 01 03
  --fresh             first empty this scale's caches: everything is computed again
  --student           only write the notebooks without the exercises' solutions, into student/
  --seed N            another seed than the notebooks' own
  --data DIR          notebook 01: your own images, a sub-folder for each class
  --references FILE   notebooks 02, 03: your own reference instances, COCO JSON (02 also tunes on them)
  --targets FILE      notebooks 02, 03: your own target images, COCO JSON (annotations may be missing for 03)
  --images DIR        notebooks 02, 03: the folder of the images that both name
  --weights NAME      notebook 03: zoo, official or random (official models, untrained) instead of the scale's
  --help              this text

Results: figures/<scale>/index.html, .png and .csv beside it, executed notebooks in figures/<scale>/notebooks/; of your
own data at pocket scale in figures/pocket/own_data/, so that the pocket results stay.
Computed features and models: .cache/<scale>/. Exit code: 0, or 1 when anything failed, or 2 for a wrong option.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import dataclasses
import io
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import filelock
import nbformat
import pandas as pd
import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from PIL import Image

from report import notebook_page, write_report
from samantics.cache import PROJECT, atomic_path, cache_dir, remove_leftovers
from samantics.errors import StudyError
from samantics.run import available_cores, checked_seed, few_colours, figures_dir, own_figures
from samantics.scales import get_scale

NOTEBOOKS = PROJECT / "notebooks"
NUMBERED = re.compile(r"[0-9A-Z][0-9]_\w+")
VALUE_OPTIONS = ("seed", "weights")
PATH_OPTIONS = ("data", "references", "targets", "images")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one notebook.

    Attributes:
        notebook: its name.
        seconds: from kernel start to end.
        peak_gib: most memory that its kernel and the kernel's children held together.
        figures: pictures that it left.
        error: one line that says where and why it stopped; empty when it ran to its end.
    """

    notebook: str
    seconds: float
    peak_gib: float
    figures: int
    error: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study as the command line says; the exit code."""
    try:
        options = _options(sys.argv[1:] if arguments is None else arguments)
        if options.student:
            print(f"notebooks for students: {write_student_notebooks(select_notebooks(NOTEBOOKS, options.only))}")
            return 0
        outcomes = run_study(options.scale, options.only, options.fresh, notebook_parameters(options))
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}: mend that and run again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; finished notebooks and caches are kept", file=sys.stderr)
        return 130
    print(summary(outcomes))
    return 1 if any(outcome.error for outcome in outcomes) else 0


def run_study(
    scale: str,
    only: Sequence[str] = (),
    fresh: bool = False,
    parameters: Mapping[str, Any] | None = None,
    notebooks: Path = NOTEBOOKS,
) -> list[Outcome]:
    """Run the numbered notebooks of a folder in order; a failing one does not stop the others.

    Args:
        scale: name of a scale.
        only: numbers or names of the notebooks to run; all when empty.
        fresh: empty the scale's cache first.
        parameters: values for those parameters that a notebook has; each must be known to one notebook at least.

    Raises:
        StudyError: unknown scale, notebook or parameter; another run of this scale is under way.
    """
    get_scale(scale)
    paths = select_notebooks(notebooks, only)
    values = {"scale": scale} | dict(parameters or {})
    unknown = set(values) - {name for path in paths for name in parameter_names(path)} - {"scale"}
    if unknown:
        raise StudyError(f"no notebook of this run takes --{min(unknown)}: leave it out, or choose others by --only")
    figures = figures_dir().resolve() / scale
    for variable, place in (("SAMANTICS_FIGURES", figures_dir()), ("SAMANTICS_CACHE", cache_dir())):
        if place.exists() and not place.is_dir():
            raise StudyError(f"{place} is a file and cannot hold results: let {variable} name a folder")
    with only_run(scale), _kernel_environment():
        if fresh:
            shutil.rmtree(cache_dir() / scale, ignore_errors=True)
        for folder in (figures, cache_dir() / scale):
            remove_leftovers(folder, "**/.*")
        outcomes: list[Outcome] = []
        reports: list[Path] = []
        for path in paths:
            own = any(values.get(name) for name in parameter_names(path).intersection(PATH_OPTIONS))
            place = own_figures(scale).resolve() if own else figures
            outcomes.append(execute(path, place, values))
            save_outcomes(place, outcomes[-1:])
            reports.append(write_report(place))
    for report in dict.fromkeys(reports):
        print(f"report: {report}")
    return outcomes


def select_notebooks(folder: Path, only: Sequence[str] = ()) -> list[Path]:
    """The numbered notebooks of a folder (``00_...`` to ``99_...``, then appendices ``A1_...``), sorted.

    Raises:
        StudyError: none there, or ``only`` names one that is not.
    """
    paths = sorted(path for path in folder.glob("*.ipynb") if NUMBERED.fullmatch(path.stem))
    if not paths:
        raise StudyError(f"{folder} has no numbered notebook: restore it with git checkout")
    for name in only:
        if not any(_is_called(path, name) for path in paths):
            known = ", ".join(path.stem for path in paths)
            raise StudyError(f"no notebook is called {name!r}: choose from {known}")
    return [path for path in paths if not only or any(_is_called(path, name) for name in only)]


def parameter_names(path: Path) -> set[str]:
    """Names that the notebook's cell tagged ``parameters`` assigns.

    Raises:
        StudyError: the notebook cannot be read, or that cell is not Python.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
        cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        statements = [statement for cell in cells for statement in ast.parse(cell.source).body]
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): restore it with git checkout") from error
    except Exception as error:  # what is no notebook makes nbformat raise nearly every kind
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise StudyError(f"{path} is damaged ({reason}): restore it with git checkout") from error
    targets = [s.targets[0] if isinstance(s, ast.Assign) else getattr(s, "target", None) for s in statements]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def write_student_notebooks(paths: Sequence[Path], folder: Path = PROJECT / "student") -> Path:
    """Write the notebooks with an empty cell in place of each that is tagged ``solution``; the folder.

    Raises:
        StudyError: the folder cannot be written.
    """
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if "solution" in cell.metadata.get("tags", []):
                cell.source = "# Your answer\n"
        with atomic_path(folder / path.name) as temporary:
            nbformat.write(notebook, temporary)
    return folder


# --------------------------------------------------------------------------------------------------- one notebook


def execute(path: Path, figures: Path, parameters: Mapping[str, Any]) -> Outcome:
    """Run one notebook; leave it with its outputs, and as a page, in ``figures/notebooks``, also when it fails.

    Raises:
        StudyError: the folder cannot be written.
    """
    known = parameter_names(path)
    given = {name: value for name, value in parameters.items() if name in known}
    target = figures / "notebooks" / path.name
    before, started, error = _pictures(figures, path), time.monotonic(), ""
    with Monitor(path.stem) as monitor, atomic_path(target) as temporary:
        try:
            papermill.execute_notebook(
                path,
                temporary,
                given,
                engine_name="watched",
                kernel_name="python3",
                language="python",
                progress_bar=False,
                cwd=path.parent,
                coalesce_streams=True,
                extra_arguments=["--log-level=40"],  # a kernel's warning about its transport is no news to a reader
                monitor=monitor,
            )
        except papermill.PapermillExecutionError as failure:
            error = f"{path.stem} stopped in cell [{failure.exec_count}]: {_reason(failure)}"
        except DeadKernelError:
            error = f"{path.stem}: its kernel died in cell {monitor.cell} of {monitor.cells}, as when memory runs out"
        clean_notebook(temporary)
    with atomic_path(target.with_suffix(".html")) as temporary:
        temporary.write_text(notebook_page(nbformat.read(target, as_version=4), path.stem), encoding="utf-8")
    left, seconds = _pictures(figures, path) - before, round(time.monotonic() - started, 1)
    outcome = Outcome(path.stem, seconds, round(monitor.peak / 2**30, 2), len(left), error)
    print(_row(outcome), flush=True)
    return outcome


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
    """Take out of an executed notebook what differs between machines and reruns (times, the project's own path).

    Its pictures are kept in 256 colours: a third of their size.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"  # papermill draws one at random
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = _few_colours(data["image/png"])
    text = nbformat.writes(notebook).replace(f"{figures_dir()}/", "figures/").replace(f"{PROJECT}/", "")
    path.write_text(text + "\n", encoding="utf-8")


def _few_colours(png: str) -> str:
    """A picture (base64) in 256 colours."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as drawn:
        few = few_colours(drawn)
    small = io.BytesIO()
    few.save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


class Monitor(contextlib.AbstractContextManager["Monitor"]):
    """Shows how far a notebook is and remembers the most memory that this process's children held.

    Attributes:
        cell, cells: code cell under way, and how many there are.
        peak: bytes; shared pages count once (proportional set size).
    """

    def __init__(self, name: str, interval: float = 1.0) -> None:
        self.name = name
        self.interval = interval
        self.cell = self.cells = self.peak = 0
        self._started = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        """Show progress in place on a terminal, else a line for every cell that takes its time (5 s at least)."""
        shown, terminal = time.monotonic(), sys.stderr.isatty()
        while not self._over.wait(self.interval):
            self.peak = max(self.peak, children_memory())
            seconds = time.monotonic() - self._started
            line = f"{self.name}  cell {self.cell} of {self.cells}  {seconds // 60:.0f}:{seconds % 60:02.0f}"
            if terminal:
                print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
            elif time.monotonic() - shown >= 5:
                shown = time.monotonic()
                print(line, file=sys.stderr, flush=True)
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def children_memory() -> int:
    """Bytes that all processes started by this one hold together; pages that they share count once."""
    processes, total = psutil.Process().children(recursive=True), 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            # the kernel walks all pages of a process to find what it shares: not when there is nobody to share with
            total += process.memory_info().rss if len(processes) == 1 else process.memory_full_info().pss
    return total


class WatchedEngine(NBClientEngine):
    """Papermill's engine, telling a :class:`Monitor` which cell runs."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: NotebookExecutionManager, kernel_name: str, *, monitor: Monitor, **kwargs: Any
    ) -> None:
        """See :class:`papermill.engines.NBClientEngine`."""
        code = [index for index, cell in enumerate(nb_man.nb.cells) if cell.cell_type == "code"]
        monitor.cells = len(code)
        start_cell = nb_man.cell_start

        def cell_start(cell: nbformat.NotebookNode, cell_index: int) -> None:
            monitor.cell = sum(index <= cell_index for index in code)
            start_cell(cell, cell_index)

        nb_man.cell_start = cell_start
        super().execute_managed_notebook(nb_man, kernel_name, **kwargs)


papermill_engines.register("watched", WatchedEngine)
logging.getLogger("papermill").setLevel(logging.ERROR)


# ------------------------------------------------------------------------------------------------------- the run


@contextlib.contextmanager
def only_run(scale: str) -> Iterator[None]:
    """Hold the one place of a run at this scale.

    Raises:
        StudyError: another process holds it.
    """
    cache_dir().mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(cache_dir() / f"{scale}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise StudyError(f"another run at scale {scale} is under way ({lock.lock_file}): wait for its end") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _kernel_environment() -> Iterator[None]:
    """Kernels inherit: the same folders, as many threads as there are cores, and no debugger's warning."""
    before = dict(os.environ)
    # relative ones would be others there: kernels work in the notebooks' folder
    os.environ.update(SAMANTICS_FIGURES=str(figures_dir().resolve()), SAMANTICS_CACHE=str(cache_dir().resolve()))
    cores = str(available_cores())
    os.environ.update(OMP_NUM_THREADS=cores, MKL_NUM_THREADS=cores, OPENBLAS_NUM_THREADS=cores)
    os.environ.update(PYDEVD_DISABLE_FILE_VALIDATION="1", JUPYTER_PREFER_ENV_PATH="1", TOKENIZERS_PARALLELISM="false")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def save_outcomes(figures: Path, outcomes: Sequence[Outcome]) -> None:
    """Write ``run.csv``: the newest outcome of every notebook of this scale, in order."""
    path = figures / "run.csv"
    table = pd.DataFrame([dataclasses.asdict(outcome) for outcome in outcomes])
    if path.is_file():
        earlier = pd.read_csv(path, keep_default_na=False)
        table = pd.concat([earlier[~earlier["notebook"].isin(table["notebook"])], table])
    with atomic_path(path) as temporary:
        table.sort_values("notebook").to_csv(temporary, index=False)


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table that ends a run, and below it what failed."""
    lines = ["", f"{'notebook':<28}{'seconds':>9}{'peak memory':>14}{'figures':>9}", *map(_row, outcomes)]
    failed = [outcome.error for outcome in outcomes if outcome.error]
    return "\n".join([*lines, *(f"error: {error}" for error in failed)])


def _row(outcome: Outcome) -> str:
    end = "  failed" if outcome.error else ""
    return f"{outcome.notebook:<28}{outcome.seconds:>9.1f}{outcome.peak_gib:>10.2f} GiB{outcome.figures:>9}{end}"


# -------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}: see ./run_all.sh --help", file=sys.stderr)
        raise SystemExit(2)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="run_all.sh", usage=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--scale", default="pocket")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--student", action="store_true")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--weights")
    for name in PATH_OPTIONS:
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_args(arguments)
    if options.help:
        print(__doc__)
        raise SystemExit(0)
    return options


def notebook_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """The options that notebooks take as parameters, where given; paths made absolute.

    Raises:
        StudyError: a path does not exist, or the seed is out of range.
    """
    if options.seed is not None:
        checked_seed(options.seed)
    values = {name: value for name in VALUE_OPTIONS if (value := getattr(options, name)) is not None}
    for name in PATH_OPTIONS:
        path: Path | None = getattr(options, name)
        if path is None:
            continue
        if not os.path.exists(path):  # nor does a name that is too long for a file
            raise StudyError(f"--{name} {path} does not exist: check the path")
        values[name] = str(path.resolve())
    return values


def _is_called(path: Path, name: str) -> bool:
    return name in (path.stem, path.stem.split("_")[0], path.name)


if __name__ == "__main__":
    sys.exit(main())
