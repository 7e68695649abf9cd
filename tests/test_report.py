from __future__ import annotations

import base64
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest

from browser import CHROMIUM, browser
from report import notebook_page, write_report
from samantics import plots as figures
from samantics.cache import PROJECT
from samantics.run import Run

COMMITTED = PROJECT / "figures" / "pocket"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


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


def test_links_inside_the_report_lead_to_files(report: Path) -> None:
    for target in re.findall(r'href="([^"#][^"]*)"', report.read_text()):
        assert target == "data:," or (report.parent / target).is_file(), target


def test_a_table_that_cannot_be_judged_is_named_in_the_report(report: Path) -> None:
    pd.DataFrame({"claim": ["C1"]}).to_csv(report.parent / "01_differences.csv", index=False)
    assert "01_differences.csv has no column role" in write_report(report.parent).read_text()


@needs_chromium
def test_report_in_a_browser(report: Path, tmp_path: Path) -> None:
    check_in_browser(report.parent, tmp_path)


@needs_chromium
def test_committed_report_in_a_browser(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(COMMITTED, tmp_path / "pocket"))
    for path in copy.glob("notebooks/*.ipynb"):  # the pages repeat them and are not committed
        text = notebook_page(nbformat.read(path, as_version=4), path.stem)
        path.with_suffix(".html").write_text(text, encoding="utf-8")
    write_report(copy)
    check_in_browser(copy, tmp_path)


def check_in_browser(folder: Path, tmp_path: Path) -> None:
    """Report and notebook pages: complete, quiet, offline, and fit for a phone, for dark rooms and for the keyboard."""
    pages = [folder / "index.html", *sorted(folder.glob("notebooks/*.html"))]
    with browser(tmp_path / "profile") as page:
        for path in pages:
            backgrounds = []
            for dark in (False, True):
                page.open(path, width=390, dark=dark)
                broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt).length"
                assert page.value(broken) == 0, path
                assert page.value("document.documentElement.scrollWidth") <= 390, f"{path} is wider than a phone"
                backgrounds.append(page.value("getComputedStyle(document.body).backgroundColor"))
                page.screenshot(tmp_path / f"{path.stem}_{'dark' if dark else 'light'}.png")
            assert backgrounds[0] != backgrounds[1], path
        page.open(pages[0], width=1200)
        page.screenshot(tmp_path / "wide.png")
        page.tab()
        assert page.value("document.activeElement.textContent") == "to the findings"
        assert all(url.startswith(("file:", "data:")) for url in page.requests())
        assert page.complaints() == []
