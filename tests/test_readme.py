from __future__ import annotations

import io
import re
import subprocess
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from readme import README, filled, findings_table, notebook_table
from samantics.cache import PROJECT


def committed_tables(folder: Path) -> Path | None:
    """The tables of the pocket run as they were committed, whatever a run has made of them since; None without git."""
    archive = ["git", "-C", str(PROJECT), "archive", "HEAD", "figures/pocket"]
    found = subprocess.run(archive, capture_output=True)
    if found.returncode:
        return None
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "figures" / "pocket"


def test_readme_says_what_the_tables_say_that_it_was_made_from(tmp_path: Path) -> None:
    """Those that lie here, or, after a reader's own run, the committed ones: times differ on each machine."""
    text = README.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == {"findings", "notebooks"}
    if filled(text, PROJECT / "figures" / "pocket") != text:
        committed = committed_tables(tmp_path)
        if committed is None:
            pytest.skip("the tables here are not those of README, and which were committed is not known without git")
        assert filled(text, committed) == text, "run python -m samantics readme"


def test_links_to_files_lead_somewhere() -> None:
    for page in (README, *(PROJECT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_tables_without_results_claim_nothing(tmp_path: Path) -> None:
    assert findings_table(tmp_path).count("**not measured**") == 5


def test_notebook_table_gives_times_of_the_run(tmp_path: Path) -> None:
    assert "not run" in notebook_table(tmp_path)
    run = {"notebook": "00_start_here", "seconds": 90.0, "peak_gib": 1.26, "figures": 4, "error": ""}
    pd.DataFrame([run]).to_csv(tmp_path / "run.csv", index=False)
    assert "| 1.5 min, 1.3 GiB |" in notebook_table(tmp_path)
