"""What a run leaves, the pages and README's tables that are made of it, and how two runs are compared."""

import base64
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import samantics
from compare import agree, differences, table_differences
from refusals import refused
from report import README, filled, notebook_page, write_report
from samantics.cache import PROJECT
from samantics.run import PIXELS_WIDE, Run, available_cores, start_run

RUN = {"notebook": "99_test", "seconds": 90.0, "peak_gib": 1.26, "figures": 1, "error": ""}


@pytest.fixture
def report(pocket_run: Run) -> Path:
    """The report of a small run: a picture, a table, an executed notebook with code, output and picture."""
    figure, folder = plt.figure(), pocket_run.figures / "notebooks"
    pocket_run.record("weights", {"sam": "abc123"})
    pocket_run.save(
        figure,
        pd.DataFrame({"encoder": ["sam", "<b>"], "top1": [1.5, None]}),
        "99_line",
        'A line "that" rises & falls.',
    )
    plt.close(figure)
    pocket_run.save(None, pd.DataFrame({"encoder": ["<b>"]}), "99_table", "Only numbers.")
    picture = base64.b64encode((pocket_run.figures / "99_line.png").read_bytes()).decode()
    cell = nbformat.v4.new_code_cell("plot(1)", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("display_data", {"image/png": picture, "text/plain": "a picture"})]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Does it rise?\n\nIt does."), cell])
    folder.mkdir()
    nbformat.write(notebook, folder / "99_test.ipynb")
    (folder / "99_test.html").write_text(notebook_page(notebook, "99_test"))
    pd.DataFrame([RUN]).to_csv(pocket_run.figures / "run.csv", index=False)
    return write_report(pocket_run.figures)


def test_report_has_findings_figures_tables_and_origin_and_its_links_lead_to_files(report: Path) -> None:
    text = report.read_text()
    assert text.index('id="findings"') < text.index("Does it rise?") < text.index('id="provenance"')
    assert 'alt="A line &#34;that&#34; rises &amp; falls."' in text and "99_table: Only numbers." in text
    assert "abc123" in text and "&lt;b&gt;" in text and text.count("not measured") >= 5
    for target in re.findall(r'href="([^"#][^"]*)"', text):
        assert target == "data:," or (report.parent / target).is_file(), target


def test_results_of_an_earlier_run_and_of_a_failed_one_are_not_shown(report: Path) -> None:
    failed = {"error": "stopped in cell [2]"}
    for change, shown in (({"started": "1999-01-01"}, 2), ({"started": "2999-01-01"}, 0), (failed, 0)):
        pd.DataFrame([RUN | change]).assign(data="photos").to_csv(report.parent / "run.csv", index=False)
        text = write_report(report.parent).read_text()
        assert text.count("99_table: Only numbers.") + text.count('href="99_line.csv"') == shown
        assert "on your own data: <b>photos</b>" in text and ("stopped in cell [2]" in text) == (change is failed)


def test_a_table_that_cannot_be_judged_is_named_in_the_report(report: Path) -> None:
    pd.DataFrame({"claim": ["C1"]}).to_csv(report.parent / "01_differences.csv", index=False)
    assert "01_differences.csv has no column role" in write_report(report.parent).read_text()


def test_pages_need_nothing_from_elsewhere_and_fit_phones_dark_rooms_and_readers_of_text(report: Path) -> None:
    for page in (report, *report.parent.glob("notebooks/*.html")):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", text), page
        assert 'name="viewport"' in text and "prefers-color-scheme" in text, page
        pictures = re.findall(r"<img[^>]*>", text)
        assert pictures and all(re.search(r'alt="[^"]+"', picture) for picture in pictures), page


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"mine": 1}', "does not belong to a result of the study: remove it"),
        ("[1]", "is damaged: remove it and run its notebook again"),
        ('{"name": "../../secret", "notebook": "01_a"}', "does not belong"),
    ],
)
def test_odd_files_among_the_results_are_named(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "01_notes.json").write_text(text)
    refused(f"01_notes.json {says}", write_report, tmp_path)


# ----------------------------------------------------------------------------------------------------------- README


def test_readme_says_what_the_tables_say_that_it_was_made_from(tmp_path: Path) -> None:
    """Those that lie here, or, after a reader's own run, the committed ones: times differ on each machine."""
    text = README.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == {"findings", "notebooks"}
    if filled(text, PROJECT / "figures" / "pocket") != text:
        archive = ["git", "-C", str(PROJECT), "archive", "HEAD", "figures/pocket"]
        committed = subprocess.run(archive, capture_output=True)
        if committed.returncode:
            pytest.skip("the tables here are not those of README, and which were committed is not known without git")
        with tarfile.open(fileobj=io.BytesIO(committed.stdout)) as tar:
            tar.extractall(tmp_path, filter="data")
        assert filled(text, tmp_path / "figures" / "pocket") == text, "run python -m samantics readme"


TABLE = pd.DataFrame({"encoder": ["sam", "clip"], "top1": [11.06, 73.92], "third": [1 / 3, np.float32(0.1)]})


def test_a_result_is_a_picture_its_numbers_and_their_origin(pocket_run: Run) -> None:
    figure, path = plt.figure(), pocket_run.figures / "99_bars.png"
    pocket_run.record("weights", {"sam": "abc"})
    pocket_run.save(figure, TABLE, "99_bars", "Bars of accuracy.")
    plt.close(figure)
    with Image.open(path) as picture:
        assert picture.width == PIXELS_WIDE
    pd.testing.assert_frame_equal(pd.read_csv(path.with_suffix(".csv")), TABLE, rtol=1e-5)
    origin = json.loads(path.with_suffix(".json").read_text())
    assert origin["caption"] == "Bars of accuracy." and origin["recorded"] == {"weights": {"sam": "abc"}}
    assert (origin["scale"], origin["seed"], origin["notebook"]) == ("pocket", 3, "99_test")
    assert origin["packages"]["segment-anything"] == "1.0" and origin["machine"]["cores"] == 1
    table = pocket_run.figures / "99_table.csv"
    for _ in range(2):  # a table alone; a rerun leaves equal bytes
        pocket_run.save(None, TABLE, "99_table")
        assert table.read_bytes() == path.with_suffix(".csv").read_bytes() and not table.with_suffix(".png").exists()


def test_a_quick_run_marks_every_figure_and_record(places: Path) -> None:
    run, figure = start_run("quick", "99_test"), plt.figure()
    run.save(figure, TABLE, "99_bars")
    (mark,) = [text.get_text() for text in figure.texts]
    assert mark == json.loads((run.figures / "99_bars.json").read_text())["mark"] and "quick run" in mark
    assert run.figures.name == "quick" and not start_run("pocket").scale.mark
    plt.close(figure)


def test_two_values_under_one_name_and_seeds_that_numpy_would_not_take_are_refused(pocket_run: Run) -> None:
    pocket_run.record("data", "abc")
    pocket_run.record("data", "abc")
    refused("recorded 'data' as 'abc' and now as 'def'", pocket_run.record, "data", "def")
    for seed in (-1, 2**32, 10**30):
        refused(f"seed is {seed}: choose one from 0 to", start_run, "pocket", "99_test", seed)


def test_cores_follow_the_thread_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert available_cores() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "not a number")
    assert available_cores() >= 1


def test_every_name_that_a_reader_imports_is_there_and_importing_loads_no_model_package() -> None:
    assert all(getattr(samantics, name) is not None for name in samantics.__all__)
    with pytest.raises(AttributeError, match="samantics has no 'sam'"):
        _ = samantics.sam
    code = "import samantics.cli, sys; samantics.cli.main(['run', '--help']); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "False"


OLD = pd.DataFrame(
    {"encoder": ["sam", "clip"], "top1": [10.0, 70.0], "top1_low": [8.0, 66.0], "top1_high": [12.0, 74.0], "dim": 160}
)
# AP50, without an interval, may move by (12 - 8) * 20 / 10 in the first row, by a tenth in the second: AP is certain
AP = pd.DataFrame(
    {"encoder": ["a", "b"], "AP": [10.0, 40.0], "AP50": [20.0, 60.0], "low": [8.0, 40.0], "high": [12.0, 40.0]}
)


@pytest.mark.parametrize(
    ("table", "changes", "lines"),
    [
        (OLD, {"top1": [13.9, 63.0]}, []),  # they may leave their interval by half its width
        (OLD, {"top1": [14.1, 70.0]}, ["sam: top1 is 14.1, expected 6 to 14"]),
        (OLD, {"top1": [5.9, 78.5]}, ["clip: top1 is 78.5, expected 62 to 78", "sam: top1 is 5.9, expected 6 to 14"]),
        (OLD, {"top1": [float("nan"), 70.0]}, ["sam: top1 is nan, expected 6 to 14"]),
        (OLD, {"dim": [160, 161]}, ["clip: dim is 161, expected 160 to 160"]),
        (OLD, {"encoder": ["sam", "sam2"]}, ["2 rows are in one run only, such as clip"]),
        (AP, {"AP50": [27.9, 65.9]}, []),
        (AP, {"AP50": [28.1, 66.1]}, ["a: AP50 is 28.1, expected 12 to 28", "b: AP50 is 66.1, expected 54 to 66"]),
    ],
)
def test_numbers_may_move_as_far_as_they_are_uncertain_and_counts_not_at_all(
    table: pd.DataFrame, changes: dict[str, Any], lines: list[str]
) -> None:
    assert table_differences(table, table.assign(**changes).iloc[::-1], ["encoder"]) == lines


def test_other_columns_are_a_difference() -> None:
    assert "columns encoder, top1" in table_differences(OLD, OLD[["encoder", "top1"]], ["encoder"])[0]


def test_folders_are_compared_table_by_table(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    table = pd.DataFrame({"oracle": ["a", "b"], "iou_type": "segm", "AP": 60.0, "low": 58.0, "high": 62.0})
    for folder in (old, new):
        folder.mkdir()
        table.to_csv(folder / "03_oracles.csv", index=False)
    assert differences(old, new) == []
    table.assign(AP=[60.0, 70.0]).to_csv(new / "03_oracles.csv", index=False)
    assert differences(old, new) == ["03_oracles: ('b', 'segm'): AP is 70, expected 56 to 64"]
    (new / "03_oracles.csv").unlink()
    assert differences(old, new) == [f"{new / '03_oracles.csv'} is missing"]


def test_another_verdict_is_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = tmp_path / "old", tmp_path / "new"
    for folder, verdict, measured in zip(folders, ("partly", "not supported"), (0.1, 99.0), strict=True):
        folder.mkdir()
        table = pd.DataFrame({"claim": ["C1", "C3"], "verdict": ["supported", verdict], "measured": measured})
        table.to_csv(folder / "04_findings.csv", index=False)
        OLD.to_csv(folder / "same.csv", index=False)
    assert agree(folders[0], folders[0])
    assert not agree(*folders)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "04_findings: C3: the verdict is 'not supported', expected 'partly'",
        "1 of 2 tables are equal byte for byte",
    ]
    table[["claim"]].to_csv(folders[1] / "04_findings.csv", index=False)
    assert differences(*folders) == ["04_findings: columns claim instead of claim, verdict"]
