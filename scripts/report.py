"""What is made of a run's tables: pages that open anywhere without a network, and the tables of README.md."""

import base64
import functools
import io
import json
import re
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import jinja2
import nbconvert
import nbformat
import pandas as pd
from markupsafe import Markup
from PIL import Image
from pygments.formatters import HtmlFormatter

from samantics.cache import PROJECT, write_text
from samantics.errors import StudyError
from samantics.metrics.claims import NOT_MEASURED, claims, evidence, judge, shown
from samantics.metrics.intervals import Interval

README = PROJECT / "README.md"
EMBEDDED_WIDTH = 1400  # pixels of the pictures inside the report; the full ones lie beside it
ROWS_SHOWN = 60  # of a table without a picture
# of a result's record
ORIGIN = ("scale", "mark", "seed", "git_revision", "written", "machine", "python", "packages", "recorded")
TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)


def notebook_page(notebook: nbformat.NotebookNode, title: str) -> str:
    """A notebook without widgets as one HTML page that asks the network for nothing."""
    body, _ = nbconvert.HTMLExporter(template_name="basic").from_notebook_node(notebook)
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    plain = ".highlight, .highlight pre { background: var(--soft) !important; }"
    style = f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n{plain}"
    return _page(notebook={"title": title, "body": Markup(body), "style": Markup(style)})  # noqa: S704


def write_report(figures: Path) -> Path:
    """Write `index.html` of a folder of figures: findings, each notebook's figures and tables, their origin.

    Shown is what a notebook's newest run wrote, and nothing of one that failed: its page says how far it came.
    """
    runs, results = _runs(figures), [_result(path) for path in sorted(figures.glob("[0-9A-Z][0-9]_*.json"))]
    newest = {row["notebook"]: row for row in runs.to_dict("records")}
    ends = {name: "9" if row.get("error") else str(row.get("started", "")) for name, row in newest.items()}
    results = [result for result in results if result["written"] >= ends.get(result["notebook"], "")]
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
    latest = {result["notebook"]: result for result in sorted(results, key=lambda result: result["written"])}
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
    write_text(figures / "index.html", text)
    return figures / "index.html"


def _page(**content: Any) -> str:
    return TEMPLATES.get_template("report.html").render(content).strip() + "\n"


def _runs(figures: Path) -> pd.DataFrame:
    """The newest outcome of each notebook (`study.Outcome`), as far as it ran."""
    path = figures / "run.csv"
    return pd.read_csv(path, keep_default_na=False) if path.is_file() else pd.DataFrame({"notebook": []})


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
        comparisons = evidence(figures)
        verdicts = judge(comparisons)
    except StudyError as error:
        return {"fault": str(error)}
    verdicts["this run"] = _measured(verdicts, "–")
    claims = verdicts[["claim", "statement", "paper", "this run", "verdict"]].to_dict("records")
    return {"claims": claims, "comparisons": _table(comparisons.drop(columns="others"))}


def _measured(verdicts: pd.DataFrame, unknown: str) -> list[str]:
    """What was measured of each claim, with its interval."""
    values = [Interval(*numbers) for numbers in verdicts[["measured", "low", "high"]].to_numpy()]
    return [unknown if isnan(interval.value) else shown(interval) for interval in values]


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


def notebook_title(path: Path) -> str:
    """The first heading of a notebook; StudyError where it has none."""
    for cell in nbformat.read(path, as_version=4).cells:
        if heading := re.match(r"# (.+)", cell.source):
            return heading.group(1)
    raise StudyError(f"{path} has no title: begin its first cell with '# ' and a question")


# ---------------------------------------------------------------------------------------------- the tables of README.md


def findings_table(figures: Path) -> list[Sequence[str]]:
    """The five claims, the paper's figures, this run's and the verdict."""
    rows: list[Sequence[str]] = [("", "claim", "paper", "pocket run [95 %]", "verdict"), ["---"] * 5]
    judged, measures = judge(evidence(figures)), claims().set_index("claim")["measure"]
    for row, value in zip(judged.to_dict("records"), _measured(judged, ""), strict=True):
        measured = f"{value}: {measures[row['claim']]}" if value else NOT_MEASURED
        rows.append((row["claim"], row["statement"].removesuffix("."), row["paper"], measured, f"**{row['verdict']}**"))
    return rows


def notebook_table(figures: Path) -> list[Sequence[str]]:
    """Each notebook, its question (its title), and what it took in the pocket run."""
    rows: list[Sequence[str]] = [("notebook", "question", "pocket run"), ("---", "---", "---:")]
    runs = _runs(figures).set_index("notebook").to_dict("index")
    for source in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        run, name = runs.get(source.stem), f"[{source.stem}](notebooks/{source.name})"
        time = f"{run['seconds'] / 60:.1f} min, {run['peak_gib']:.1f} GiB" if run else "not run"
        rows.append((name, notebook_title(source).split(" · ")[-1], time))
    return rows


TABLES = {"findings": findings_table, "notebooks": notebook_table}


def filled(text: str, figures: Path) -> str:
    """A text with every block `<!-- table: NAME -->` ... `<!-- end -->` made from the tables in `figures`."""

    def table(block: re.Match[str]) -> str:
        head, rule, *rows = TABLES[block[2]](figures)
        lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
        return "\n".join([block[1], lines[0], f"|{'|'.join(rule)}|", *lines[1:], "<!-- end -->"])

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def rewrite_readme() -> None:
    """Fill README.md from the committed pocket run."""
    write_text(README, filled(README.read_text(encoding="utf-8"), PROJECT / "figures" / "pocket"))
