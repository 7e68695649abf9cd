"""The five claims judged from the tables of a run, by comparisons whose margins were fixed before any result.

A comparison "more is above less" holds when the lower end of the 95 % interval of `more` is above 0 and above the upper
end of the interval of `less` times a factor: `MISSING` where the paper says that something is missing ("far less",
"fails", "not there"), `BETTER` where it says that one thing is better than another. It is open where an unfit model
could have made the outcome. Unfit is a model of the pocket zoo that stays below `ENOUGH` of an aim that was set before
it was trained; `ENOUGH` was set after the first zoo had been seen and before any claim was judged with it.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import math
from collections.abc import Callable, Collection, Sequence
from importlib.resources import files
from pathlib import Path

import pandas as pd

from samantics.errors import StudyError
from samantics.metrics.intervals import Interval
from samantics.plots import COLOURS, LABELS

MISSING, BETTER, ENOUGH = 2.0, 1.0, 0.8
PAPER_PROBE = {"sam": (11.06, 25.37), "sam2": (23.16, 44.44), "clip": (73.92, 92.89), "dinov2": (77.43, 93.78)}
"""ImageNet-1k top-1 and top-5 in percent, as the paper reports them."""

METRICS = {"silhouette": "silhouette", "knn": "kNN accuracy", "nmi": "NMI of k-means", "linear": "linear probe"}
UNINFORMATIVE = {"wrong_reference": "wrong\nclass", "random_reference": "random"}  # references of notebook 02


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One thing that must be above another for a claim to hold.

    Attributes:
        statement: what is compared, in words.
        more, less: the two values, in the same unit.
        factor: how many times `less` must be exceeded.
        source: the table they come from.
        more_from, less_from: the models that `more` and `less` rest on.
    """

    statement: str
    more: Interval
    less: Interval
    factor: float
    source: str
    more_from: tuple[str, ...] = ()
    less_from: tuple[str, ...] = ()

    @property
    def gap(self) -> Interval:
        """`more - less`, its interval from the far ends of both (wider than a paired one would be)."""
        more, less = self.more, self.less
        return Interval(more.value - less.value, more.low - less.high, more.high - less.low)

    @property
    def holds(self) -> bool:
        """Whether the whole interval of `more` is above `factor` times that of `less`, and above 0."""
        return self.more.low > max(0.0, self.factor * self.less.high)

    def is_open(self, unfit: Collection[str]) -> bool:
        """Whether the weakness of an `unfit` model could have made this outcome."""
        return bool(set(self.less_from if self.holds else self.more_from) & set(unfit))


def verdict(comparisons: Sequence[Comparison], unfit: Collection[str] = ()) -> str:
    """`supported` when all comparisons hold, `partly` when some do, `not supported` when none does.

    Open comparisons count as not holding beside others that do; a claim with no other is `not measured`.
    """
    decided = [comparison for comparison in comparisons if not comparison.is_open(unfit)]
    if not decided:
        return "not measured"
    held = sum(comparison.holds for comparison in decided)
    return {len(comparisons): "supported", 0: "not supported"}.get(held, "partly")


def shown(value: Interval) -> str:
    """An interval as text: percent and AP with one digit, shares with two."""
    return format(value, ".1f" if abs(value.value) >= 1 else ".2f")


# ----------------------------------------------------------------------------------------------------------- tables


def claims() -> pd.DataFrame:
    """The five claims: `claim,statement,measure,paper,table`; `measure` is the one number of the claim."""
    return _asset("claims.csv")


def zoo_aims(figures: Path) -> pd.DataFrame:
    """`encoder, measure, value, aim, reached, ceiling`: the pocket zoo at its own tasks; empty where not measured.

    `ceiling`: what the model could reach at best; empty where no bound is known.
    """
    path, aims = figures / "00_zoo_quality.csv", _asset("aims.csv")
    if not path.is_file():
        return pd.DataFrame(columns=["encoder", "measure", "value", "aim", "reached", "ceiling"])
    found = pd.read_csv(path).set_index(["encoder", "measure"])["value"]
    value, ceiling = (found.reindex(pd.MultiIndex.from_frame(aims[["encoder", c]])) for c in ("measure", "ceiling"))
    return pd.DataFrame(
        {
            "encoder": aims["encoder"],
            "measure": aims["measure"],
            "value": value.to_numpy(),
            "aim": aims["aim"],
            "reached": value.to_numpy() / aims["aim"],
            "ceiling": ceiling.to_numpy(),
        }
    )


def unfit_models(figures: Path) -> tuple[str, ...]:
    """The models of the pocket zoo that do not reach `ENOUGH` of an aim."""
    aims = zoo_aims(figures)
    return tuple(aims.loc[aims["reached"] < ENOUGH, "encoder"].unique())


def comparisons(figures: Path) -> dict[str, list[Comparison]]:
    """The comparisons of every claim, by its name; none where its table is not there."""
    tables = {claim: figures / table for claim, table in zip(claims()["claim"], claims()["table"], strict=True)}
    return {c: COMPARE[c](pd.read_csv(path)) if path.is_file() else [] for c, path in tables.items()}


def evidence(figures: Path) -> pd.DataFrame:
    """All comparisons of all claims: `claim,comparison,more,less,factor,holds,open,source`."""
    unfit = unfit_models(figures)
    rows = [
        (claim, c.statement, shown(c.more), shown(c.less), c.factor, c.holds, c.is_open(unfit), c.source)
        for claim, found in comparisons(figures).items()
        for c in found
    ]
    return pd.DataFrame(rows, columns=["claim", "comparison", "more", "less", "factor", "holds", "open", "source"])


def findings(figures: Path) -> pd.DataFrame:
    """The verdicts: `claim,statement,paper,measured,low,high,verdict,source`; `measured` is empty where unknown.

    `measured` is the gap of the first comparison, for C5 the AP itself.
    """
    rows, unfit, judged = [], unfit_models(figures), comparisons(figures)
    for claim in claims().to_dict("records"):
        found = judged[claim["claim"]]
        number = Interval(math.nan, math.nan, math.nan)
        if found:
            number = found[0].more if claim["claim"] == "C5" else found[0].gap
        words = f"{claim['statement']} Measured: {claim['measure']}."
        source = found[0].source if found else claim["table"]
        rows.append((claim["claim"], words, claim["paper"], *number, verdict(found, unfit), source))
    columns = ["claim", "statement", "paper", "measured", "low", "high", "verdict", "source"]
    return pd.DataFrame(rows, columns=columns)


def by_factor(figures: Path, factors: Sequence[float] = (1.0, 1.5, 2.0, 3.0)) -> pd.DataFrame:
    """The verdicts if every comparison had to hold by this factor: rows are claims, columns factors."""
    unfit = unfit_models(figures)
    rows = {
        claim: [verdict([dataclasses.replace(c, factor=factor) for c in found], unfit) for factor in factors]
        for claim, found in comparisons(figures).items()
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=[f"{factor:g}x" for factor in factors])


def origins(figures: Path) -> pd.DataFrame:
    """Where the judged tables come from: `table,notebook,seed,written,revision`; empty where there is no table."""
    rows = []
    for name in sorted(set(claims()["table"])):
        note = (figures / name).with_suffix(".json")
        facts = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        row = {"table": name} | {key: facts.get(key, "") for key in ("notebook", "seed", "written")}
        rows.append(row | {"revision": str(facts.get("git_revision", ""))[:8]})
    return pd.DataFrame(rows)


def summary(figures: Path) -> pd.DataFrame:
    """The values that the verdicts rest on: `claims,bar,value,low,high,colour`, for the tables that the run has."""
    bars: list[tuple[str, str, Interval, str]] = []  # claims, bar, value, name of its colour
    tables = {
        name: pd.read_csv(figures / name) for name in dict.fromkeys(claims()["table"]) if (figures / name).is_file()
    }
    for name, table in tables.items():
        if name.startswith("01"):
            rows = rows_with(table, labels=_levels(table)[0], probe="linear", layer="final").drop_duplicates("encoder")
            bars += [("C1", LABELS[r["encoder"]], _top1(r), r["encoder"]) for _, r in rows.iterrows()]
        elif name.startswith("02_icl"):
            rows = rows_with(table, shots=table["shots"].max(), iou_type="bbox")
            oracle, base = rows_with(rows, variant="class_oracle"), rows_with(rows, split="base").set_index("variant")
            bars += [("C2", r["split"], _ap(r), r["split"]) for _, r in oracle.iterrows()]
            bars += [("C2", label, _ap(base.loc[control]), "random") for control, label in UNINFORMATIVE.items()]
        elif name.startswith("02"):
            for split, stage in itertools.product(("base", "novel"), ("before", "after")):
                bars.append(("C3, C4", f"{split}\n{stage}", lift(table, stage, split, "knn").times(100), split))
        else:
            rows = pipeline_setting(table)[0].set_index("source")
            names = [source for source in ("sam", "sam2", "clip", "dinov2", "random") if source in rows.index]
            bars += [("C5", LABELS[source], _ap(rows.loc[source]), source) for source in names]
    rows = [(claims, bar, *value, COLOURS[colour]) for claims, bar, value, colour in bars]
    return pd.DataFrame(rows, columns=["claims", "bar", "value", "low", "high", "colour"])


# --------------------------------------------------------------------------------------------- the five comparisons


def compare_probes(table: pd.DataFrame) -> list[Comparison]:
    """C1, from `01_zoos.csv`: linear probes on what each encoder gives out, pooled as in the paper.

    Of models that were trained several times it is the mean, with the noise of training in its interval.
    """

    def top1(encoder: str, labels: str) -> Interval:
        return _top1(row_with(table, encoder=encoder, labels=labels, probe="linear", layer="final"))

    source, comparisons = _source("01_zoos.csv", table), []
    levels = _levels(table)
    for labels in levels:
        semantic = min(top1("clip", labels), top1("dinov2", labels))
        masks = max(top1("sam", labels), top1("sam2", labels))
        statement = f"{labels}: the weaker of CLIP and DINOv2 above the better of SAM and SAM 2, top-1"
        factor = MISSING if labels != "category" else BETTER
        comparisons.append(Comparison(statement, semantic, masks, factor, source, ("clip", "dinov2"), ("sam", "sam2")))
    newer, older = top1("sam2", levels[0]), top1("sam", levels[0])
    statement = f"{levels[0]}: SAM 2 above SAM, top-1"
    return [*comparisons, Comparison(statement, newer, older, BETTER, source, ("sam2",), ("sam",))]


def _levels(table: pd.DataFrame) -> list[str]:
    """The levels of label, that of the paper's kind first: drawings, or the classes of other data."""
    return sorted(table["labels"].unique(), key=lambda name: name == "category")


def compare_incontext(table: pd.DataFrame) -> list[Comparison]:
    """C2, from `02_icl_ap.csv`: box AP with the class oracle, most shots."""
    rows = rows_with(table, shots=table["shots"].max(), iou_type="bbox")
    base, novel = (_ap(row_with(rows, variant="class_oracle", split=split)) for split in ("base", "novel"))
    control = max(_ap(row_with(rows, variant=name, split="base")) for name in UNINFORMATIVE)
    words, source, sam = f"box AP at {table['shots'].max()} shots", _source("02_icl_ap.csv", table), ("sam",)
    return [
        Comparison(f"{words}: base above novel categories", base, novel, MISSING, source, sam, sam),
        Comparison(f"{words}, base: above references that tell nothing", base, control, MISSING, source, sam, sam),
    ]


def compare_structure(
    table: pd.DataFrame, words: str, more: tuple[str, str], less: tuple[str, str]
) -> list[Comparison]:
    """C3 and C4, from `02_separability.csv`: every metric over shuffled labels at two pairs of stage and split."""
    source, sam = _source("02_separability.csv", table), ("sam",)
    return [
        Comparison(
            f"{METRICS.get(m, m)} {words}", lift(table, *more, m), lift(table, *less, m), MISSING, source, sam, sam
        )
        for m in sorted(table["metric"].unique(), key=lambda metric: (not metric.startswith("knn"), metric))
    ]


def compare_sources(table: pd.DataFrame) -> list[Comparison]:
    """C5, from `03_pipeline_ap.csv`: mask AP with DINOv2 as the source of meaning above SAM and above random."""
    masks, shots = pipeline_setting(table)
    dinov2, random, sam = (_ap(row_with(masks, source=name)) for name in ("dinov2", "random", "sam"))
    words, source, both = (
        f"mask AP at {shots} shots: DINOv2 above",
        _source("03_pipeline_ap.csv", table),
        ("sam", "dinov2"),
    )
    return [
        Comparison(f"{words} an untrained encoder", dinov2, random, BETTER, source, both),
        Comparison(f"{words} SAM's own features", dinov2, sam, BETTER, source, both, ("sam",)),
    ]


def pipeline_setting(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The mask rows of `03_pipeline_ap.csv` in the one setting that is judged, a row per source, and its shots.

    The paper's own, if it is there: SAM's proposals, no merging, most references.

    Raises:
        StudyError: no setting has dinov2, sam and random.
    """
    settings = rows_with(table, iou_type="segm").groupby(["proposals", "merging", "shots"], sort=False)
    complete = {
        (proposals == "sam", merging == "none", int(shots)): rows
        for (proposals, merging, shots), rows in settings
        if {"dinov2", "sam", "random"} <= set(rows["source"])
    }
    if not complete:
        raise StudyError("03_pipeline_ap.csv has no setting with dinov2, sam and random: run notebook 03 again")
    return complete[max(complete)], max(complete)[-1]


def rows_with(table: pd.DataFrame, **values: object) -> pd.DataFrame:
    """The rows with these values."""
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def row_with(table: pd.DataFrame, **values: object) -> pd.Series:
    """The first row with these values.

    Raises:
        StudyError: there is none.
    """
    rows = rows_with(table, **values)
    if rows.empty:
        wanted = ", ".join(f"{column}={value}" for column, value in values.items())
        raise StudyError(f"a table of this run has no row with {wanted}: run its notebook again by ./run_all.sh --only")
    return rows.iloc[0]


def lift(table: pd.DataFrame, stage: str, split: str, metric: str) -> Interval:
    """A metric above what shuffled labels give."""
    row = row_with(table, stage=stage, split=split, metric=metric)
    return Interval(*(row[column] - row["shuffled"] for column in ("value", "low", "high")))


def _top1(row: pd.Series) -> Interval:
    return Interval(row["top1"], row["top1_low"], row["top1_high"])


def _ap(row: pd.Series) -> Interval:
    return Interval(row["AP"], row["low"], row["high"])


def _source(name: str, table: pd.DataFrame) -> str:
    return f"{name} ({table['seeds'].max()} seeds)" if "seeds" in table else name


def _asset(name: str) -> pd.DataFrame:
    text = files("samantics").joinpath(f"assets/{name}").read_text(encoding="utf-8")
    return pd.read_csv(io.StringIO(text), keep_default_na=False)


COMPARE: dict[str, Callable[[pd.DataFrame], list[Comparison]]] = {
    "C1": compare_probes,
    "C2": compare_incontext,
    "C3": functools.partial(
        compare_structure,
        words="over shuffled labels, base: after above before the MLP",
        more=("after", "base"),
        less=("before", "base"),
    ),
    "C4": functools.partial(
        compare_structure,
        words="over shuffled labels, after the MLP: base above novel",
        more=("after", "base"),
        less=("after", "novel"),
    ),
    "C5": compare_sources,
}
