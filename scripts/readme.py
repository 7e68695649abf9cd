"""The tables of README.md, made from the committed pocket run so that no number in it is typed by hand.

``python scripts/readme.py`` writes them anew between their markers.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import pandas as pd

from samantics.cache import PROJECT, atomic_path
from samantics.errors import StudyError
from samantics.metrics.claims import PAPER_PROBE, findings, shown
from samantics.metrics.intervals import Interval
from samantics.plots import LABELS

README = PROJECT / "README.md"
NEEDS = {  # by a notebook's number: what the scales lite and paper need
    "01": "four models' weights; an image folder",
    "02": "SAM's and DINOv2's weights; COCO JSON; a GPU",
    "03": "SAM's and DINOv2's weights; COCO JSON",
    "04": "the tables of 01 to 03",
    "A1": "nothing: it is about the pocket zoo",
}


def probe_table(figures: Path) -> str:
    """Markdown: each model's linear probe in the paper and in this run, percent with 95 % intervals."""
    lines = [
        "| model | paper: ImageNet-1k | pocket: which drawing | pocket: category of held-out drawings |",
        "|---|---:|---:|---:|",
    ]
    path = figures / "01_zoos.csv"
    columns = ["encoder", "labels", "probe", "layer", "top1", "top1_low", "top1_high"]
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=columns)
    for encoder in ("sam", "sam2", "clip", "dinov2", "random"):
        paper = f"{PAPER_PROBE[encoder][0]}" if encoder in PAPER_PROBE else ""
        rows = table[(table["encoder"] == encoder) & (table["probe"] == "linear") & (table["layer"] == "final")]
        cells = []
        for labels in ("drawing", "category"):
            values = rows.loc[rows["labels"] == labels, columns[-3:]].to_numpy(float)
            cells.append(str(Interval(*values[0])) if len(values) else "not measured")
        lines.append(f"| {LABELS[encoder]} | {paper} | {' | '.join(cells)} |")
    return "\n".join(lines)


def findings_table(figures: Path) -> str:
    """Markdown: the five claims, the paper's figures, this run's and the verdict."""
    lines = ["| | claim | paper | pocket run [95 %] | verdict |", "|---|---|---|---|---|"]
    for row in findings(figures).to_dict("records"):
        claim, measure = row["statement"].removesuffix(".").split(" Measured: ")
        measured = "not measured"
        if row["verdict"] != "not measured":
            measured = f"{shown(Interval(row['measured'], row['low'], row['high']))}: {measure}"
        lines.append(f"| {row['claim']} | {claim} | {row['paper']} | {measured} | **{row['verdict']}** |")
    return "\n".join(lines)


def notebook_table(figures: Path, notebooks: Path = PROJECT / "notebooks") -> str:
    """Markdown: each notebook, its question (its title), what it took in the pocket run, what it needs elsewhere."""
    path = figures / "run.csv"
    runs = pd.read_csv(path).set_index("notebook").to_dict("index") if path.is_file() else {}
    verdicts = {"01": ["C1"], "02": ["C2", "C3", "C4"], "03": ["C5"]}
    found = findings(figures).set_index("claim")["verdict"].to_dict()
    lines = [
        "| notebook | question | answer | pocket: time | memory | figures | beyond pocket it needs |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for source in sorted(notebooks.glob("*.ipynb")):
        cells = "not run | | "
        if run := runs.get(source.stem):
            cells = f"{run['seconds'] / 60:.1f} min | {run['peak_gib']:.1f} GiB | {run['figures']}"
        question = notebook_title(source).split(" · ")[-1]
        answer = ", ".join(f"{claim} {found[claim]}" for claim in verdicts.get(source.stem[:2], []))
        needs = NEEDS.get(source.stem[:2], "")
        lines.append(f"| [{source.stem}](notebooks/{source.name}) | {question} | {answer} | {cells} | {needs} |")
    return "\n".join(lines)


def notebook_title(path: Path) -> str:
    """The first heading of a notebook.

    Raises:
        StudyError: it has none.
    """
    for cell in nbformat.read(path, as_version=4).cells:
        if heading := re.match(r"# (.+)", cell.source):
            return heading.group(1)
    raise StudyError(f"{path} has no title: begin its first cell with '# ' and a question")


TABLES = {"probe": probe_table, "findings": findings_table, "notebooks": notebook_table}


def filled(text: str, figures: Path) -> str:
    """A text with every block ``<!-- table: NAME -->`` ... ``<!-- end -->`` made from the tables in ``figures``."""

    def block(match: re.Match[str]) -> str:
        return f"{match.group(1)}\n{TABLES[match.group(2)](figures)}\n<!-- end -->"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    try:
        text = filled(README.read_text(encoding="utf-8"), PROJECT / "figures" / "pocket")
        with atomic_path(README) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except StudyError as error:
        sys.exit(f"error: {error}")
