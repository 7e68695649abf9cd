"""Pages of a run that open anywhere without a network: each executed notebook, and the report that leads to them."""

from __future__ import annotations

import base64
import copy
import html
import io
import json
from pathlib import Path
from typing import Any

import nbconvert
import nbformat
import pandas as pd
from PIL import Image
from pygments.formatters import HtmlFormatter

from readme import notebook_title
from samantics.cache import atomic_path
from samantics.errors import StudyError
from samantics.metrics.claims import evidence, findings, shown
from samantics.metrics.intervals import Interval

EMBEDDED_WIDTH = 1100  # pixels of the pictures inside the report; the full ones lie beside it
ROWS_SHOWN = 60  # of a table without a picture
SHOWN = ("seed", "git_revision", "written", "machine", "python", "packages", "recorded")  # of a result's record
FACTS = {"notebook", "caption", *SHOWN}

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --soft: #f3f5f8; --line: #d8dee6; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --paper: #14181e; --soft: #1e242c; --line: #38414d; --link: #7db8f5; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
h1, h2, h3 { line-height: 1.2; }
img, svg { max-width: 100%; height: auto; }
img { background: #fff; border-radius: 4px; }
pre { overflow-x: auto; padding: .6rem .8rem; background: var(--soft); border-radius: 4px; font-size: .85rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.wide { display: block; overflow-x: auto; }
figure { margin: 1.5rem 0; } figcaption { font-size: .9rem; margin-top: .3rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1rem; padding: 0; list-style: none; }
.skip { position: absolute; left: -999rem; } .skip:focus { position: static; }
@media (max-width: 40rem) { /* a claim is a card */
  .cards thead { display: none; } .cards tr { display: block; border-bottom: 1px solid var(--line); padding: .4rem 0; }
  .cards td { display: block; border: 0; padding: .1rem 0; }
  .cards td::before { content: attr(data-label); opacity: .7; }
}
.verdict { font-weight: 600; white-space: nowrap; }
.prompt { font: .75rem monospace; opacity: .7; } .anchor-link { display: none; }
"""


def notebook_page(notebook: nbformat.NotebookNode, title: str) -> str:
    """An executed notebook as one HTML page that asks the network for nothing; widgets show as their text."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):  # a widget's script wants libraries that a page without a network lacks
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    exporter = nbconvert.HTMLExporter(template_name="basic")
    body, _ = exporter.from_notebook_node(notebook)
    back = '<nav><a href="../index.html">the report of this run</a></nav>'
    return page(title, f"{back}<main>{body}</main>{back}", _code_colours())


def write_report(figures: Path) -> Path:
    """Write ``index.html`` of a run: findings first, then each notebook's figures and tables, then their origin.

    Args:
        figures: folder of one scale's figures.

    Raises:
        StudyError: the folder cannot be written, or holds a file among the results that is none.
    """
    results = [_record(path) for path in sorted(figures.glob("[0-9A-Z][0-9]_*.json"))]
    names = sorted(
        {path.stem for path in figures.glob("notebooks/*.ipynb")} | {result["notebook"] for result in results}
    )
    sections = [_notebook_section(figures, name, [r for r in results if r["notebook"] == name]) for name in names]
    links = "".join(f'<li><a href="#{name}">{name}</a></li>' for name in names)
    body = (
        f'<a class="skip" href="#findings">to the findings</a>'
        f"<header><h1>Does SAM know what it segments?</h1>"
        f"<p>Report of the run at scale <b>{figures.name}</b>.</p></header>"
        f'<nav aria-label="sections"><ul><li><a href="#findings">findings</a></li>{links}'
        f'<li><a href="#provenance">provenance</a></li></ul></nav>'
        f"<main>{_findings_section(figures)}{''.join(sections)}{_provenance_section(figures, results)}</main>"
    )
    path = figures / "index.html"
    with atomic_path(path) as temporary:
        temporary.write_text(page(f"SAMantics: {figures.name} run", body), encoding="utf-8")
    return path


def _record(path: Path) -> dict[str, Any]:
    """What is known of a picture or table: the file that lies beside it."""
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StudyError(f"{path} is damaged: remove it and run its notebook again") from error
    if record.get("name") != path.stem or FACTS - record.keys():
        raise StudyError(f"{path} does not belong to a result of the study: remove it")
    return record


def _findings_section(figures: Path) -> str:
    """The verdicts and the rule behind them; in their place the reason, when a table cannot be judged."""
    title = '<section id="findings"><h2>Findings</h2>'
    try:
        verdicts, comparisons = findings(figures), evidence(figures)
    except StudyError as error:
        return f"{title}<p>There are no verdicts: {html.escape(str(error))}</p></section>"
    names = ("claim", "statement", "paper", "this run", "verdict")
    rows = []
    for row in verdicts.to_dict("records"):
        measured = (
            "–" if row["verdict"] == "not measured" else shown(Interval(row["measured"], row["low"], row["high"]))
        )
        cells = [row["claim"], row["statement"], row["paper"], measured, row["verdict"]]
        pairs = [(name, html.escape(str(cell))) for name, cell in zip(names, cells, strict=True)]
        rows.append("".join(f'<td data-label="{name}: " class="{name}">{cell}</td>' for name, cell in pairs))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    rule = "A claim is supported when all comparisons below hold, partly when some do, not supported when none does."
    picture = (
        _picture(figures, "04_summary", "The five claims in one figure.") if _exists(figures, "04_summary") else ""
    )
    return (
        f'{title}<table class="cards"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
        f"{picture}<details><summary>The comparisons behind the verdicts</summary><p>{rule} One holds when the "
        f"whole 95 % interval of the first value is above 0 and above that of the second times the factor.</p>"
        f"{_table(comparisons)}</details></section>"
    )


def _exists(figures: Path, name: str) -> bool:
    return (figures / f"{name}.png").is_file()


def _notebook_section(figures: Path, name: str, results: list[dict[str, Any]]) -> str:
    """A notebook's title, a link to its page, its pictures with captions, its other tables folded."""
    executed = figures / "notebooks" / f"{name}.ipynb"
    title = notebook_title(executed) if executed.is_file() else name
    parts = [f'<section id="{name}"><h2>{html.escape(title)}</h2>']
    if executed.is_file():
        parts.append(f'<p><a href="notebooks/{name}.html">the executed notebook {name}</a></p>')
    for result in results:
        if _exists(figures, result["name"]):
            parts.append(_picture(figures, result["name"], result["caption"]))
    for result in results:
        table = figures / f"{result['name']}.csv"
        if not _exists(figures, result["name"]) and table.is_file():
            about = html.escape(f"{result['name']}: {result['caption']}" if result["caption"] else result["name"])
            parts.append(f"<details><summary>{about}</summary>{_table(pd.read_csv(table))}</details>")
    return "".join(parts) + "</section>"


def _picture(figures: Path, name: str, caption: str) -> str:
    with Image.open(figures / f"{name}.png") as image:
        small = image.convert("RGB")
    small.thumbnail((EMBEDDED_WIDTH, 10 * EMBEDDED_WIDTH))
    buffer = io.BytesIO()
    small.save(buffer, "webp", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    words = html.escape(caption or name)
    return (
        f'<figure><a href="{name}.png"><img src="data:image/webp;base64,{data}" alt="{words}" width="{small.width}" '
        f'height="{small.height}"></a><figcaption>{words} <a href="{name}.csv">The numbers</a>.</figcaption></figure>'
    )


def _table(table: pd.DataFrame) -> str:
    """The first rows of a table as HTML, and how many there are in all."""
    more = f"<p>The first {ROWS_SHOWN} of {len(table)} rows.</p>" if len(table) > ROWS_SHOWN else ""
    shown = table.head(ROWS_SHOWN).to_html(index=False, border=0, float_format="{:.4g}".format, na_rep="")
    return f'<div class="wide">{shown}</div>{more}'


def _provenance_section(figures: Path, results: list[dict[str, Any]]) -> str:
    """Times and memory, machine, versions, and what each notebook recorded (hashes of weights and data)."""
    parts = ['<section id="provenance"><h2>Provenance</h2>']
    runs = figures / "run.csv"
    if runs.is_file():
        parts.append(_table(pd.read_csv(runs, keep_default_na=False)))
    newest = {result["notebook"]: result for result in sorted(results, key=lambda result: str(result["written"]))}
    for name, result in sorted(newest.items()):
        facts = {key: result[key] for key in SHOWN}
        text = html.escape(json.dumps(facts, indent=1))
        parts.append(
            f"<details><summary>{name}: seed, revision, machine, versions, hashes</summary><pre>{text}</pre></details>"
        )
    return "".join(parts) + "</section>"


def page(title: str, body: str, style: str = "") -> str:
    """A whole HTML document in the project's look, light or dark as the reader's system is set."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _code_colours() -> str:
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    plain = ".highlight, .highlight pre { background: var(--soft) !important; }"
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n{plain}"
