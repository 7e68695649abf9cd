"""The tables of README.md, made from a run's tables so that no number in it is typed by hand: ``samantics readme``."""

from __future__ import annotations

import re
from math import isnan
from pathlib import Path

import nbformat
import pandas as pd

from samantics.cache import PROJECT, atomic_path
from samantics.errors import StudyError
from samantics.metrics.claims import NOT_MEASURED, PAPER_PROBE, claims, findings, shown
from samantics.metrics.intervals import Interval
from samantics.plots import LABELS

README = PROJECT / "README.md"
CLAIMS = {"01": ["C1"], "02": ["C2", "C3", "C4"], "03": ["C5"]}  # by a notebook's number: what it decides
NEEDS = {  # by a notebook's number: what the scales lite and paper need
    "01": "four models' weights; an image folder",
    "02": "SAM's and DINOv2's weights; COCO JSON; a GPU",
    "03": "SAM's and DINOv2's weights; COCO JSON",
    "04": "the tables of 01 to 03",
    "05": "your own images or COCO files",
    "A1": "nothing: it is about the pocket zoo",
    "A2": "nothing: it is about the instruments, at pocket scale",
}


def markdown(rows: list[dict[str, str]], align: str) -> str:
    """A table: columns by the keys of its first row; ``align`` has ``l`` or ``r`` for each."""
    lines = ["| " + " | ".join(row) + " |" for row in (list(rows[0]), *(list(row.values()) for row in rows))]
    return "\n".join([lines[0], "|" + "|".join({"l": "---", "r": "---:"}[side] for side in align) + "|", *lines[1:]])


def probe_table(figures: Path) -> str:
    """Each model's linear probe in the paper and in this run, percent with 95 % intervals."""
    path, columns = figures / "01_probe_accuracy.csv", ["top1", "top1_low", "top1_high"]
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame()
    measured = {}
    for row in table.to_dict("records"):
        if (row["probe"], row.get("kind")) == ("linear", "all"):
            measured[row["encoder"], row["labels"]] = str(Interval(*(row[column] for column in columns)))
    rows = []
    for encoder in ("sam", "sam2", "mae", "clip", "dinov2", "supervised", "random"):
        cells = [measured.get((encoder, labels), "not measured") for labels in ("artist", "view")]
        paper = str(PAPER_PROBE[encoder][0]) if encoder in PAPER_PROBE else ""
        names = ("model", "paper: ImageNet-1k", "pocket: class by new artists", "pocket: class in new views")
        rows.append(dict(zip(names, (LABELS[encoder], paper, *cells), strict=True)))
    return markdown(rows, "lrrr")


def findings_table(figures: Path) -> str:
    """The five claims, the paper's figures, this run's and the verdict."""
    rows, measures = [], dict(zip(claims()["claim"], claims()["measure"], strict=True))
    for row in findings(figures).to_dict("records"):
        interval = Interval(row["measured"], row["low"], row["high"])
        measured = "" if isnan(interval.value) else f"{shown(interval)}: {measures[row['claim']]}"
        measured = NOT_MEASURED if row["verdict"] == NOT_MEASURED else measured
        cells = (row["claim"], row["statement"].removesuffix("."), row["paper"], measured, f"**{row['verdict']}**")
        rows.append(dict(zip(("", "claim", "paper", "pocket run [95 %]", "verdict"), cells, strict=True)))
    return markdown(rows, "lllll")


def notebook_table(figures: Path) -> str:
    """Each notebook, its question (its title), what it took in the pocket run, what it needs elsewhere."""
    path = figures / "run.csv"
    runs = pd.read_csv(path).set_index("notebook").to_dict("index") if path.is_file() else {}
    found = findings(figures).set_index("claim")["verdict"]
    rows = []
    for source in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        number, run = source.stem[:2], runs.get(source.stem)
        rows.append(
            {
                "notebook": f"[{source.stem}](notebooks/{source.name})",
                "question": notebook_title(source).split(" · ")[-1],
                "answer": ", ".join(f"{claim} {found[claim]}" for claim in CLAIMS.get(number, [])),
                "pocket: time": f"{run['seconds'] / 60:.1f} min" if run else "not run",
                "memory": f"{run['peak_gib']:.1f} GiB" if run else "",
                "figures": str(run["figures"]) if run else "",
                "beyond pocket it needs": NEEDS.get(number, ""),
            }
        )
    return markdown(rows, "lllrrrl")


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
    return re.sub(
        r"(<!-- table: (\w+) -->)\n.*?<!-- end -->",
        lambda block: f"{block[1]}\n{TABLES[block[2]](figures)}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def rewrite() -> None:
    """Fill README.md from the committed pocket run."""
    text = filled(README.read_text(encoding="utf-8"), PROJECT / "figures" / "pocket")
    with atomic_path(README) as temporary:
        temporary.write_text(text, encoding="utf-8")
