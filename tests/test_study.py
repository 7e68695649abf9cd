import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import pandas as pd
import pytest

import study
from samantics import cli
from samantics.cache import PROJECT, cache_dir
from samantics.errors import StudyError
from samantics.run import figures_dir

SETTINGS = 'scale = "pocket"\nseed = 0\nreferences = ""'
SAVE = """\
import os
from pathlib import Path
folder = Path(os.environ["SAMANTICS_FIGURES"]) / scale / ("own_data" if references else "")
(folder / f"{NAME[:2]}_picture.png").write_bytes(b"picture")
(folder / f"{NAME[:2]}_picture.csv").write_text(f"seed\\n{seed}\\n")"""


@pytest.fixture
def own_notebooks(places: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder whose notebooks a study of the test's own runs; its results are in the test's folder."""
    monkeypatch.setattr(study, "NOTEBOOKS", places / "notebooks")
    (places / "notebooks").mkdir()
    return places / "notebooks"


def write_notebook(folder: Path, name: str, *cells: str) -> Path:
    """A notebook of a title, a cell of parameters and these cells."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    first = nbformat.v4.new_code_cell(SETTINGS, metadata={"tags": ["parameters"]}, id="parameters")
    others = [nbformat.v4.new_code_cell(cell, id=f"cell-{n}") for n, cell in enumerate(cells)]
    notebook.cells = [nbformat.v4.new_markdown_cell("# A question?", id="title"), first, *others]
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def test_run_leaves_executed_notebooks_figures_and_times_although_one_fails(own_notebooks: Path) -> None:
    bar = 'import sys\nprint(f"sam:  {50}%|##  | 1/2 [00:01]\\r\\x1b[Ahalf done", file=sys.stderr)'
    write_notebook(own_notebooks, "00_good", f'NAME = "00_good"\n{SAVE}', 'print("seed", seed)', bar)
    write_notebook(own_notebooks, "01_wrong", "fine = 1", "before = 0\nbefore / 0\nafter = 0")
    mendable = "from samantics.errors import StudyError as E\nraise E('no file x: make it')"
    write_notebook(own_notebooks, "02_mendable", mendable)
    write_notebook(own_notebooks, "notes", "1 / 0")
    outcomes, figures = study.run_study("pocket", parameters={"seed": 7}), figures_dir() / "pocket"
    names, errors = ["00_good", "01_wrong", "02_mendable"], [outcome.error for outcome in outcomes]
    assert [outcome.notebook for outcome in outcomes] == names
    assert errors == [
        "",
        "01_wrong stopped in cell [4]: ZeroDivisionError: division by zero at `before / 0`",
        "02_mendable stopped in cell [3]: no file x: make it",
    ]
    assert study.summary(outcomes).splitlines()[-1] == f"error: {errors[2]}"
    assert [outcome.figures for outcome in outcomes] == [1, 0, 0] and 0 < outcomes[0].seconds < 60
    assert pd.read_csv(figures / "00_picture.csv")["seed"].tolist() == [7]
    pages = [(figures / "notebooks" / f"{name}.html").read_text() for name in names]
    assert "seed 7" in pages[0] and "half done" in pages[0] and "50%|" not in pages[0]
    assert "ZeroDivisionError" in pages[1] and "http" not in "".join(pages).replace("http://www.w3.org", "")
    assert "papermill" not in (figures / "notebooks" / "00_good.ipynb").read_text()
    assert not list(figures.rglob(".*"))

    write_notebook(own_notebooks, "01_wrong", "before = 1")
    (again,) = study.run_study("pocket", only=["01"])
    times = pd.read_csv(figures / "run.csv", keep_default_na=False)
    assert times["notebook"].tolist() == names and times["seconds"][1] == again.seconds
    assert times["error"].tolist() == ["", "", errors[2]]


def test_own_data_runs_05_and_its_results_lie_beside_those_of_pocket(
    own_notebooks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("00_good", "05_your_data"):
        write_notebook(own_notebooks, name, f'NAME = "{name}"\n{SAVE}\nfrom tqdm import tqdm\nlist(tqdm([1], "a bar"))')
    study.run_study("pocket")
    assert "a bar: " in capsys.readouterr().err
    figures = figures_dir() / "pocket"
    before = {path: path.read_bytes() for path in figures.rglob("*") if path.is_file()}
    (own_notebooks / "mine.json").touch()
    (outcome,) = study.run_study("pocket", parameters={"references": own_notebooks / "mine.json"})
    assert (outcome.notebook, outcome.figures, outcome.error, outcome.data) == ("05_your_data", 1, "", "mine.json")
    assert capsys.readouterr().out.splitlines()[-1].endswith("pocket/own_data/index.html")
    names = ("05_picture.png", "run.csv", "index.html", "notebooks/05_your_data.ipynb")
    assert all((figures / "own_data" / name).is_file() and figures / name in before for name in names)
    assert all(path.read_bytes() == content for path, content in before.items())
    (outcome,) = study.run_study("pocket", only=["00"], parameters={"references": own_notebooks / "mine.json"})
    assert outcome.notebook == "00_good" and (figures / "own_data" / "00_picture.png").is_file()
    assert not (figures / "own_data" / "05_picture.png").exists()  # of other data, for all that is known


def test_notebook_whose_kernel_dies_is_named(own_notebooks: Path) -> None:
    write_notebook(own_notebooks, "00_dies", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "1")
    write_notebook(own_notebooks, "01_lives")
    dead, alive = study.run_study("pocket")
    assert dead.error == "00_dies: its kernel died in cell 3 of 4, as when memory runs out" and not alive.error


def test_kernels_write_where_the_run_says_and_their_children_count_as_their_memory(
    own_notebooks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = 'import time; block = bytearray(300 * 2**20); block[::4096] = b"x" * len(block[::4096]); time.sleep(2)'
    big = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    write_notebook(
        own_notebooks, "00_a", "from samantics.run import figures_dir\n(figures_dir() / 'here').touch()", big
    )
    monkeypatch.chdir(own_notebooks.parent)
    monkeypatch.setenv("SAMANTICS_FIGURES", "figures")
    monkeypatch.setenv("SAMANTICS_CACHE", "cache")
    before = study.children_memory() / 2**30  # other tests may have left a server of processes behind
    (outcome,) = study.run_study("pocket")
    assert outcome.error == "" and 0.3 < outcome.peak_gib - before < 1
    assert (own_notebooks.parent / "figures" / "here").exists()
    assert [path.name for path in own_notebooks.iterdir()] == ["00_a.ipynb"]


def test_fresh_empties_this_scales_cache_and_leftovers_of_a_killed_run_go(own_notebooks: Path) -> None:
    write_notebook(own_notebooks, "00_nothing")
    kept, gone = cache_dir() / "lite" / "features", cache_dir() / "pocket" / "features"
    left = figures_dir() / "pocket" / "notebooks" / ".01_probing.ipynb.x7a.ipynb"
    notes = left.with_name("01_notes.txt")
    for path in (kept, gone, left, notes):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{")
    study.run_study("pocket")
    assert gone.exists() and notes.exists() and not left.exists()
    study.run_study("pocket", fresh=True)
    assert kept.exists() and not gone.exists()


def test_second_run_of_a_scale_is_refused_while_the_first_holds_it(places: Path) -> None:
    refused = pytest.raises(StudyError, match="another run at scale pocket is under way")
    with study.only_run("pocket"), study.only_run("lite"), refused, study.only_run("pocket"):
        pass
    with study.only_run("pocket"):
        pass


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("run --scale poket", 1, "error: no scale is called 'poket': choose from pocket, "),
        ("run --only 01 07", 1, "error: no notebook is called '07': choose from 01_probe"),
        ("run --seed -1", 1, "error: seed is -1: choose one from 0 to 4294967295"),
        ("run --target-images none", 1, "error: --target-images none does not exist: check the path"),
        ("run --only 01 --images .", 1, "error: no notebook of this run takes --images: leave it out, or"),
        ("run FIGURES", 1, "error: {file} is a file and cannot hold results: let SAMANTICS_FIGURES name a folder"),
        ("run CACHE", 1, "error: {file} is a file and cannot hold results: let SAMANTICS_CACHE name a folder"),
        ("run --sead 1", 2, "No such option: --sead"),
        ("train nobody", 1, "error: no objective is called 'nobody'"),
        ("extract nowhere", 1, "error: nowhere"),
        ("tune --scale poket", 1, "error: no scale is called 'poket': choose from pocket, quick, lite, paper"),
        ("run --quick --scale lite", 1, "error: --quick is a look at the pocket scale: leave it out, or --scale lite"),
        ("compare old new", 1, "error: old has no tables of a run: check the path"),
    ],
)
def test_wrong_commands_are_told_and_leave_nothing(
    arguments: str, code: int, message: str, own_notebooks: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_notebook(own_notebooks, "01_probe")
    file, words = own_notebooks.parent / "file", arguments.split()
    file.write_text("mine")
    monkeypatch.chdir(own_notebooks.parent)
    if words[-1].isupper():
        monkeypatch.setenv(f"SAMANTICS_{words.pop()}", str(file))
    assert cli.main(words) == code
    told = capsys.readouterr().err
    assert message.format(file=file) in told and (code == 2 or told.count("\n") == 1)
    assert sorted(path.name for path in own_notebooks.parent.iterdir()) == ["file", "notebooks"]
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(13, "Permission denied", "x.csv"), "x.csv: Permission denied"),
        (OSError("timed\nout"), "timed out"),
    ],
)
def test_an_error_of_the_system_is_told_in_one_line(
    error: OSError, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_script", mock.Mock(side_effect=error))
    assert cli.main(["readme"]) == 1
    assert capsys.readouterr().err == f"error: {says}: mend that and run again\n"


def test_notebooks_run_in_order_with_appendices_last(own_notebooks: Path) -> None:
    for name in ("A1_more", "02_b", "00_a", "draft", "10_c"):
        write_notebook(own_notebooks, name)
    assert [path.stem for path in study.select_notebooks()] == ["00_a", "02_b", "10_c", "A1_more"]
    assert [path.stem for path in study.select_notebooks(["A1", "02_b", "00_a.ipynb"])] == ["00_a", "02_b", "A1_more"]


def test_student_notebooks_lack_the_solutions_only(own_notebooks: Path) -> None:
    path = write_notebook(own_notebooks, "00_a", "answer = 42", "assert answer == 42")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].metadata["tags"] = ["solution"]
    nbformat.write(notebook, path)
    folder = study.write_student_notebooks(folder=own_notebooks / "student")
    sources = [cell.source for cell in nbformat.read(folder / "00_a.ipynb", as_version=4).cells]
    assert sources == ["# A question?", SETTINGS, "# Your answer\n", "assert answer == 42"]


def test_help_of_the_script_and_of_the_command_name_the_same_options() -> None:
    """The script's is shown before anything is installed."""
    script = [str(PROJECT / "run_all.sh"), "--help"]
    command = [sys.executable, "-m", "samantics", "run", "--help"]
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, cwd="/")
    shown = [run(script).stdout, run(command).stdout]
    assert shown[0].startswith("Does SAM know what it segments?") and "#" not in shown[0]
    options = [{word for word in text.split() if re.fullmatch(r"--[a-z-]+", word)} for text in shown]
    assert options[0] == options[1] and len(options[0]) > 12
