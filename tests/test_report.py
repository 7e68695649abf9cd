from __future__ import annotations

import base64
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest

from report import notebook_page, write_report
from samantics import plots as figures
from samantics.run import Run


@pytest.fixture
def report(pocket_run: Run) -> Path:
    """The report of a small run: a picture, a table, an executed notebook with code, output and picture."""
    figures.style()
    fig, axes = plt.subplots()
    axes.plot([1, 3, 2])
    table = pd.DataFrame({"encoder": ["sam", "<b>"], "top1": [1.5, None]})
    pocket_run.record("weights", {"sam": "abc123"})
    pocket_run.save(fig, table, "99_line", 'A line "that" rises & falls.')
    plt.close(fig)
    pocket_run.save(None, table, "99_table", "Only numbers.")
    picture = (pocket_run.figures / "99_line.png").read_bytes()
    cell = nbformat.v4.new_code_cell("plot(1)", execution_count=1)
    data = {"image/png": base64.b64encode(picture).decode(), "text/plain": "a picture"}
    cell.outputs = [nbformat.v4.new_output("display_data", data)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Does it rise?\n\nIt does."), cell])
    folder = pocket_run.figures / "notebooks"
    folder.mkdir()
    nbformat.write(notebook, folder / "99_test.ipynb")
    (folder / "99_test.html").write_text(notebook_page(notebook, "99_test"))
    runs = {"notebook": "99_test", "seconds": 1.5, "peak_gib": 0.5, "figures": 1, "error": ""}
    pd.DataFrame([runs]).to_csv(pocket_run.figures / "run.csv", index=False)
    return write_report(pocket_run.figures)


def test_report_has_findings_figures_tables_and_origin(report: Path) -> None:
    text = report.read_text()
    assert text.index('id="findings"') < text.index("Does it rise?") < text.index('id="provenance"')
    assert 'alt="A line &#34;that&#34; rises &amp; falls."' in text and "99_table: Only numbers." in text
    assert "abc123" in text and "&lt;b&gt;" in text and text.count("not measured") >= 5


def test_results_of_an_earlier_run_and_of_a_failed_one_are_not_shown(report: Path) -> None:
    times = report.parent / "run.csv"
    runs = pd.read_csv(times).assign(data="photos")
    for change, shown in (
        ({"started": "1999-01-01"}, 2),
        ({"started": "2999-01-01"}, 0),
        ({"error": "stopped in cell [2]"}, 0),
    ):
        runs.assign(**change).to_csv(times, index=False)
        text = write_report(report.parent).read_text()
        assert text.count("99_table: Only numbers.") + text.count('href="99_line.csv"') == shown
        assert "on your own data: <b>photos</b>" in text and ("stopped in cell [2]" in text) == ("error" in change)


def test_links_inside_the_report_lead_to_files(report: Path) -> None:
    for target in re.findall(r'href="([^"#][^"]*)"', report.read_text()):
        assert target == "data:," or (report.parent / target).is_file(), target


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
