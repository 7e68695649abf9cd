from __future__ import annotations

import itertools
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import study
from samantics.cache import cache_dir
from samantics.errors import StudyError
from samantics.run import figures_dir

SETTINGS = 'scale = "pocket"\nseed = 0\nreferences = None'
SAVE = """\
import matplotlib; matplotlib.use("agg")
import matplotlib.pyplot as plt, pandas as pd
from samantics.plots import save_figure
from samantics.run import start_run
run = start_run(scale, NAME, seed)
fig, axes = plt.subplots()
path = save_figure(run, fig, pd.DataFrame({"seed": [seed]}), NAME[:2] + "_picture", "Nothing.")"""


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMANTICS_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "cache"))


def write_notebook(folder: Path, name: str, *cells: str, settings: str = SETTINGS) -> None:
    notebook = nbformat.v4.new_notebook()
    first = nbformat.v4.new_code_cell(settings, metadata={"tags": ["parameters"]})
    notebook.cells = [nbformat.v4.new_markdown_cell("# A question?"), first, *map(nbformat.v4.new_code_cell, cells)]
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")


def test_run_leaves_executed_notebooks_figures_and_times_although_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "notebooks"
    write_notebook(folder, "00_good", f'NAME = "00_good"\n{SAVE}', 'print("seed", seed)')
    write_notebook(folder, "01_wrong", "fine = 1", "before = 0\nbefore / 0\nafter = 0", settings=SETTINGS)
    write_notebook(folder, "02_mendable", "from samantics.errors import StudyError as E\nraise E('no file x: make it')")
    write_notebook(folder, "notes", "1 / 0")
    outcomes = study.run_study("pocket", parameters={"seed": 7}, notebooks=folder)

    assert [outcome.notebook for outcome in outcomes] == ["00_good", "01_wrong", "02_mendable"]
    assert [outcome.error for outcome in outcomes] == [
        "",
        "01_wrong stopped in cell [4]: ZeroDivisionError: division by zero at `before / 0`",
        "02_mendable stopped in cell [3]: no file x: make it",
    ]
    assert [outcome.figures for outcome in outcomes] == [1, 0, 0]
    assert 0.02 < outcomes[0].peak_gib < 8 and outcomes[0].seconds > 0
    figures = figures_dir() / "pocket"
    assert pd.read_csv(figures / "00_picture.csv")["seed"].tolist() == [7]
    for name in ("00_good", "01_wrong", "02_mendable"):
        executed = nbformat.read(figures / "notebooks" / f"{name}.ipynb", as_version=4)
        assert "papermill" not in executed.metadata and not any("papermill" in cell.metadata for cell in executed.cells)
        assert "http" not in (figures / "notebooks" / f"{name}.html").read_text().replace("http://www.w3.org", "")
    assert "seed 7" in (figures / "notebooks" / "00_good.html").read_text()
    assert "ZeroDivisionError" in (figures / "notebooks" / "01_wrong.html").read_text()
    table = study.summary(outcomes)
    assert "error: 02_mendable stopped in cell [3]: no file x: make it" in table.splitlines()
    assert not list(figures.rglob(".*"))

    write_notebook(folder, "01_wrong", "before = 1")
    again = study.run_study("pocket", only=["01"], notebooks=folder)
    times = pd.read_csv(figures / "run.csv", keep_default_na=False)
    assert [outcome.error for outcome in again] == [""]
    assert times["notebook"].tolist() == ["00_good", "01_wrong", "02_mendable"]
    assert times["seconds"].tolist()[1] == again[0].seconds
    assert times["error"].tolist() == ["", "", outcomes[2].error]


def test_results_of_own_data_lie_beside_those_of_pocket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, own = (
        tmp_path / "notebooks",
        "from samantics.run import own_data\nif references: run = own_data(run)",
    )
    write_notebook(folder, "00_good", f'NAME = "00_good"\n{SAVE}'.replace("fig, axes", f"{own}\nfig, axes"))
    study.run_study("pocket", notebooks=folder)
    figures = figures_dir() / "pocket"
    before = {path: path.read_bytes() for path in figures.rglob("*") if path.is_file()}
    (outcome,) = study.run_study("pocket", parameters={"references": "mine.json"}, notebooks=folder)
    assert outcome.figures == 1 and capsys.readouterr().out.splitlines()[-1].endswith("pocket/own_data/index.html")
    beside = figures / "own_data"
    names = ("00_picture.png", "run.csv", "index.html", "notebooks/00_good.ipynb")
    assert all((beside / name).is_file() and figures / name in before for name in names)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_notebook_whose_kernel_dies_is_named(tmp_path: Path) -> None:
    write_notebook(tmp_path / "notebooks", "00_dies", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    (outcome,) = study.run_study("pocket", notebooks=tmp_path / "notebooks")
    assert outcome.error == "00_dies: its kernel died in cell 3 of 3, as when memory runs out"


def test_peak_memory_counts_the_children_of_the_kernel(tmp_path: Path) -> None:
    child = 'import time; block = bytearray(300 * 2**20); block[::4096] = b"x" * len(block[::4096]); time.sleep(2)'
    cell = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    write_notebook(tmp_path / "notebooks", "00_big", cell)
    before = study.children_memory() / 2**30  # other tests may have left a server of processes behind
    (outcome,) = study.run_study("pocket", notebooks=tmp_path / "notebooks")
    assert outcome.error == "" and 0.3 < outcome.peak_gib - before < 1


def test_fresh_empties_the_caches_of_this_scale_only(tmp_path: Path) -> None:
    write_notebook(tmp_path / "notebooks", "00_nothing")
    kept, gone = cache_dir() / "lite" / "features", cache_dir() / "pocket" / "features"
    for path in (kept, gone):
        path.parent.mkdir(parents=True)
        path.write_text("computed")
    study.run_study("pocket", notebooks=tmp_path / "notebooks")
    assert gone.exists()
    study.run_study("pocket", fresh=True, notebooks=tmp_path / "notebooks")
    assert kept.exists() and not gone.exists()


def test_half_written_files_of_a_killed_run_go(tmp_path: Path) -> None:
    write_notebook(tmp_path / "notebooks", "00_nothing")
    left = figures_dir() / "pocket" / "notebooks" / ".01_probing.ipynb.x7a.ipynb"
    left.parent.mkdir(parents=True)
    left.write_text("{")
    kept = left.with_name("01_notes.txt")
    kept.write_text("mine")
    study.run_study("pocket", notebooks=tmp_path / "notebooks")
    assert kept.exists() and not left.exists()


def test_second_run_of_a_scale_is_refused_while_the_first_holds_it() -> None:
    refused = pytest.raises(StudyError, match="another run at scale pocket is under way")
    with study.only_run("pocket"), study.only_run("lite"), refused, study.only_run("pocket"):
        pass
    with study.only_run("pocket"):
        pass


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--scale", "poket"], 1, "error: no scale is called 'poket': choose from pocket, lite, paper"),
        (["--only", "01", "07"], 1, "error: no notebook is called '07': choose from 01_probe"),
        (["--references", "none.json"], 1, "error: --references none.json does not exist: check the path"),
        (["--images", "."], 1, "error: no notebook of this run takes --images: leave it out, or choose others by"),
        (["--sead", "1"], 2, "error: unrecognized arguments: --sead 1: see ./run_all.sh --help"),
        (["--only"], 2, "error: argument --only: expected at least one argument: see"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_notebook(tmp_path / "notebooks", "01_probe")
    monkeypatch.setattr(study.run_study, "__defaults__", ((), False, None, tmp_path / "notebooks"))
    try:
        found = study.main(arguments)
    except SystemExit as stop:
        found = int(str(stop.code))
    output = capsys.readouterr().err
    assert found == code
    assert output.startswith(message) and output.count("\n") == 1


def test_notebooks_run_in_order_with_appendices_last(tmp_path: Path) -> None:
    for name in ("A1_more", "02_b", "00_a", "draft", "10_c"):
        write_notebook(tmp_path, name)
    assert [path.stem for path in study.select_notebooks(tmp_path)] == ["00_a", "02_b", "10_c", "A1_more"]
    chosen = study.select_notebooks(tmp_path, ["A1", "02_b", "00_a.ipynb"])
    assert [path.stem for path in chosen] == ["00_a", "02_b", "A1_more"]


def test_student_notebooks_lack_the_solutions_only(tmp_path: Path) -> None:
    write_notebook(tmp_path, "00_a", "answer = 42", "assert answer == 42")
    notebook = nbformat.read(tmp_path / "00_a.ipynb", as_version=4)
    notebook.cells[2].metadata["tags"] = ["solution"]
    nbformat.write(notebook, tmp_path / "00_a.ipynb")
    folder = study.write_student_notebooks([tmp_path / "00_a.ipynb"], tmp_path / "student")
    sources = [cell.source for cell in nbformat.read(folder / "00_a.ipynb", as_version=4).cells]
    assert sources == ["# A question?", SETTINGS, "# Your answer\n", "assert answer == 42"]


def test_parameters_are_those_of_the_tagged_cell(tmp_path: Path) -> None:
    write_notebook(tmp_path, "00_a", "other = 1", settings="scale: str = 'pocket'\nseed = 1")
    assert study.parameter_names(tmp_path / "00_a.ipynb") == {"scale", "seed"}


@pytest.mark.parametrize("content", ["not json", '{"cells": 1}'])
def test_damaged_notebook_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "00_a.ipynb").write_text(content)
    with pytest.raises(StudyError, match=r"00_a.ipynb is damaged"):
        study.parameter_names(tmp_path / "00_a.ipynb")


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.main(["--help"])
    shown = capsys.readouterr().out
    for name in itertools.chain(("scale", "only", "fresh", "student", *study.VALUE_OPTIONS), study.PATH_OPTIONS):
        assert f"--{name} " in shown
