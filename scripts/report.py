"""Pages of a run that open anywhere without a network: each executed notebook, and the report that leads to them."""

from __future__ import annotations

import base64
import copy
import functools
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import nbconvert
import nbformat
import pandas as pd
from markupsafe import Markup
from PIL import Image
from pygments.formatters import HtmlFormatter

from readme import notebook_title
from samantics.cache import atomic_path
from samantics.errors import StudyError
from samantics.metrics.claims import evidence, findings, shown
from samantics.metrics.intervals import Interval

EMBEDDED_WIDTH = 1400  # pixels of the pictures inside the report; the full ones lie beside it
ROWS_SHOWN = 60  # of a table without a picture
# of a result's record
ORIGIN = ("scale", "mark", "seed", "git_revision", "written", "machine", "python", "packages", "recorded")
TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)


def notebook_page(notebook: nbformat.NotebookNode, title: str) -> str:
    """An executed notebook as one HTML page that asks the network for nothing; widgets show as their text."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):  # a widget's script wants libraries that a page without a network lacks
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    body, _ = nbconvert.HTMLExporter(template_name="basic").from_notebook_node(notebook)
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    plain = ".highlight, .highlight pre { background: var(--soft) !important; }"
    style = f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n{plain}"
    return _page(notebook={"title": title, "body": Markup(body), "style": Markup(style)})  # noqa: S704


def write_report(figures: Path) -> Path:
    """Write `index.html` of a folder of figures: findings, each notebook's figures and tables, their origin.

    Shown is what a notebook's newest run wrote, and nothing of one that failed: its page says how far it came.
    """
    times, results = figures / "run.csv", [_result(path) for path in sorted(figures.glob("[0-9A-Z][0-9]_*.json"))]
    runs = pd.read_csv(times, keep_default_na=False) if times.is_file() else pd.DataFrame({"notebook": []})
    newest = {row["notebook"]: row for row in runs.to_dict("records")}
    ends = {name: "9" if row.get("error") else str(row.get("started", "")) for name, row in newest.items()}
    results = [result for result in results if str(result["written"]) >= ends.get(result["notebook"], "")]
    executed = {path.stem: path for path in figures.glob("notebooks/*.ipynb")}
    sections = [
        {
            "name": name,
            "title": notebook_title(executed[name]) if name in executed else name,
            "executed": name in executed,
            "results": [result for result in results if result["notebook"] == name],
            "run": newest.get(name, {}),
        }
        for name in sorted(executed.keys() | {result["notebook"] for result in results})
    ]
    latest = {result["notebook"]: result for result in sorted(results, key=lambda result: str(result["written"]))}
    text = _page(
        scale=next((result["scale"] for result in results), figures.name),
        own=dict.fromkeys(row["data"] for row in newest.values() if row.get("data")),
        mark=next((result["mark"] for result in results), ""),
        sections=sections,
        overview=next((result for result in results if result["name"] == "04_summary"), None),
        runs=_table(runs),
        origins={name: json.dumps({key: latest[name][key] for key in ORIGIN}, indent=1) for name in sorted(latest)},
        **_verdicts(figures),
    )
    with atomic_path(figures / "index.html") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return figures / "index.html"


def _page(**content: Any) -> str:
    return TEMPLATES.get_template("report.html").render(content).strip() + "\n"


def _result(path: Path) -> dict[str, Any]:
    """What is known of a picture or table by the file beside it, with the picture, or else the table."""
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StudyError(f"{path} is damaged: remove it and run its notebook again") from error
    if record.get("name") != path.stem or {"notebook", "caption", *ORIGIN} - record.keys():
        raise StudyError(f"{path} does not belong to a result of the study: remove it")
    picture, table = path.with_suffix(".png"), path.with_suffix(".csv")
    if picture.is_file():
        record["picture"] = _embedded(picture, picture.stat().st_mtime_ns)
    elif table.is_file():
        record["table"] = _table(pd.read_csv(table))
    return record


def _verdicts(figures: Path) -> dict[str, Any]:
    """The verdicts and the comparisons behind them; in their place the reason, when a table cannot be judged."""
    try:
        verdicts, comparisons = findings(figures), evidence(figures)
    except StudyError as error:
        return {"fault": str(error)}
    claims = []
    for row in verdicts.to_dict("records"):
        measured = Interval(row["measured"], row["low"], row["high"])
        row["this run"] = shown(measured) if measured.value == measured.value else "–"  # not where it is not a number
        claims.append({name: str(row[name]) for name in ("claim", "statement", "paper", "this run", "verdict")})
    return {"claims": claims, "comparisons": _table(comparisons.drop(columns="others"))}


@functools.cache
def _embedded(path: Path, _written: int) -> str:
    """A picture as an address that holds it, small enough for a page of many; once, until it is written again."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((EMBEDDED_WIDTH, 10 * EMBEDDED_WIDTH))
    small.save(buffer, "webp", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(table: pd.DataFrame) -> Markup:
    """The first rows of a table as HTML (escaped by pandas), and how many there are in all."""
    more = f"<p>The first {ROWS_SHOWN} of {len(table)} rows.</p>" if len(table) > ROWS_SHOWN else ""
    first = table.head(ROWS_SHOWN).to_html(index=False, border=0, float_format="{:.4g}".format, na_rep="")
    return Markup(first + more)  # noqa: S704
