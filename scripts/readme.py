"""The tables of README.md, made from a run's tables so that no number in it is typed by hand: `samantics readme`."""

from __future__ import annotations

import re
from math import isnan
from pathlib import Path

import nbformat
import pandas as pd

from samantics.cache import PROJECT, atomic_path
from samantics.errors import StudyError
from samantics.metrics.claims import NOT_MEASURED, claims, findings, shown
from samantics.metrics.intervals import Interval

README = PROJECT / "README.md"


def findings_table(figures: Path) -> str:
    """The five claims, the paper's figures, this run's and the verdict."""
    rows, measures = [], dict(zip(claims()["claim"], claims()["measure"], strict=True))
    for row in findings(figures).to_dict("records"):
        interval = Interval(row["measured"], row["low"], row["high"])
        measured = NOT_MEASURED if isnan(interval.value) else f"{shown(interval)}: {measures[row['claim']]}"
        cells = (row["claim"], row["statement"].removesuffix("."), row["paper"], measured, f"**{row['verdict']}**")
        rows.append(dict(zip(("", "claim", "paper", "pocket run [95 %]", "verdict"), cells, strict=True)))
    return markdown(rows, "lllll")


def notebook_table(figures: Path) -> str:
    """Each notebook, its question (its title), and what it took in the pocket run."""
    path, rows = figures / "run.csv", []
    runs = pd.read_csv(path).set_index("notebook").to_dict("index") if path.is_file() else {}
    for source in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        name, run = f"[{source.stem}](notebooks/{source.name})", runs.get(source.stem)
        time = f"{run['seconds'] / 60:.1f} min, {run['peak_gib']:.1f} GiB" if run else "not run"
        rows.append({"notebook": name, "question": notebook_title(source).split(" · ")[-1], "pocket run": time})
    return markdown(rows, "llr")


def markdown(rows: list[dict[str, str]], align: str) -> str:
    """A table: columns by the keys of its first row; `align` has `l` or `r` for each."""
    lines = ["| " + " | ".join(row) + " |" for row in (list(rows[0]), *(list(row.values()) for row in rows))]
    return "\n".join([lines[0], "|" + "|".join({"l": "---", "r": "---:"}[side] for side in align) + "|", *lines[1:]])


def notebook_title(path: Path) -> str:
    """The first heading of a notebook; StudyError where it has none."""
    for cell in nbformat.read(path, as_version=4).cells:
        if heading := re.match(r"# (.+)", cell.source):
            return heading.group(1)
    raise StudyError(f"{path} has no title: begin its first cell with '# ' and a question")


TABLES = {"findings": findings_table, "notebooks": notebook_table}


def filled(text: str, figures: Path) -> str:
    """A text with every block `<!-- table: NAME -->` ... `<!-- end -->` made from the tables in `figures`."""
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
