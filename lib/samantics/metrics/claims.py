"""The five claims judged from the tables of a run, by comparisons whose margins were fixed before any result.

A comparison "more is above less" holds when the lower end of the 95 % interval of `more` is above 0 and above the upper
end of the interval of `less` times a factor: `MISSING` where the paper says that something is missing ("far less",
"fails", "not there"), `BETTER` where it says that one thing is better than another.

It is open where an unfit model could have made the outcome. Unfit is a model of the pocket zoo that stays below
`ENOUGH` of an aim that was set before it was trained; `ENOUGH` was set after the first zoo had been seen and before any
claim was judged with it. It is open, too, where a value rests on a model that is trained within the run and lies so
close that another processor could turn it (`TOLERANCE`): added after two machines had given different verdicts.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pandas as pd

from samantics.errors import StudyError
from samantics.metrics.intervals import Interval
from samantics.plots import COLOURS, LABELS

ASSETS = Path(__file__).resolve().parents[1] / "assets"
MISSING, BETTER, ENOUGH = 2.0, 1.0, 0.8
TOLERANCE = 0.5  # of what rests on a model that is trained within the run: kernels sum in another order elsewhere
PAPER_PROBE = {"sam": (11.06, 25.37), "sam2": (23.16, 44.44), "clip": (73.92, 92.89), "dinov2": (77.43, 93.78)}
"""ImageNet-1k top-1 and top-5 in percent, as the paper reports them."""

METRICS = {"silhouette": "silhouette", "knn": "kNN accuracy", "nmi": "NMI of k-means", "linear": "linear probe"}
ORACLE, TOP1 = "class_oracle", ("top1", "top1_low", "top1_high")
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
        tolerance: share of an interval's width by which another processor may move either value.
    """

    statement: str
    more: Interval
    less: Interval
    factor: float
    source: str
    more_from: tuple[str, ...] = ()
    less_from: tuple[str, ...] = ()
    tolerance: float = 0.0

    @property
    def gap(self) -> Interval:
        """`more - less`, its interval from the far ends of both (wider than a paired one would be)."""
        more, less = self.more, self.less
        return Interval(more.value - less.value, more.low - less.high, more.high - less.low)

    @property
    def holds(self) -> bool:
        """Whether the whole interval of `more` is above `factor` times that of `less`, and above 0."""
        return self._above(0.0)

    def _above(self, share: float) -> bool:
        """The same after both intervals have moved towards it by a share of their widths."""
        low, high = (share * (value.high - value.low) for value in (self.more, self.less))
        return self.more.low + low > max(0.0, self.factor * (self.less.high - high))

    @property
    def is_close(self) -> bool:
        """Whether another processor could turn the outcome."""
        return self._above(self.tolerance) != self._above(-self.tolerance)

    def is_open(self, unfit: Collection[str]) -> bool:
        """Whether the weakness of an `unfit` model could have made this outcome, or another processor could turn it."""
        return self.is_close or bool(set(self.less_from if self.holds else self.more_from) & set(unfit))


def verdict(comparisons: Sequence[Comparison], unfit: Collection[str] = ()) -> str:
    """`supported` when all comparisons hold, `partly` when some do, `not supported` when none does.

    Open comparisons count as not holding beside others that do. A claim with no other is `undecided` where some are
    close, else `not measured`.
    """
    decided = [comparison for comparison in comparisons if not comparison.is_open(unfit)]
    if not decided:
        return "undecided" if any(comparison.is_close for comparison in comparisons) else "not measured"
    held = sum(comparison.holds for comparison in decided)
    return {len(comparisons): "supported", 0: "not supported"}.get(held, "partly")


def shown(value: Interval) -> str:
    """An interval as text: percent and AP with one digit, shares with two."""
    return format(value, ".1f" if abs(value.value) >= 1 else ".2f")


# ----------------------------------------------------------------------------------------------------------- tables


def claims() -> pd.DataFrame:
    """The five claims: `claim,statement,measure,paper,table`; `measure` is the one number of the claim."""
    return pd.read_csv(ASSETS / "claims.csv")


def zoo_aims(figures: Path) -> pd.DataFrame:
    """`encoder, measure, value, aim, reached, ceiling`: the pocket zoo at its own tasks; empty where not measured.

    `ceiling`: what the model could reach at best; empty where no bound is known.
    """
    path, aims = figures / "00_zoo_quality.csv", pd.read_csv(ASSETS / "aims.csv", keep_default_na=False)
    found = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["encoder", "measure", "value"])
    values = found.set_index(["encoder", "measure"])["value"]
    value, ceiling = (
        values.reindex(pd.MultiIndex.from_frame(aims[["encoder", c]])).to_numpy(float) for c in ("measure", "ceiling")
    )
    table = aims.assign(value=value, reached=value / aims["aim"], ceiling=ceiling)
    return table[["encoder", "measure", "value", "aim", "reached", "ceiling"]].head(len(aims) * path.is_file())


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
    unfit, judged = unfit_models(figures), comparisons(figures)
    rows = []
    for claim in claims().itertuples():
        found = judged[claim.claim]
        number: Sequence[float] = (math.nan,) * 3
        if found:
            number = found[0].more if claim.claim == "C5" else found[0].gap
        words = f"{claim.statement} Measured: {claim.measure}."
        source = found[0].source if found else claim.table
        rows.append((claim.claim, words, claim.paper, *number, verdict(found, unfit), source))
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
    for name in sorted(claims()["table"].unique()):
        note = (figures / name).with_suffix(".json")
        facts = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        revision = str(facts.get("git_revision", ""))[:8]
        rows.append([name, *(facts.get(key, "") for key in ("notebook", "seed", "written")), revision])
    return pd.DataFrame(rows, columns=["table", "notebook", "seed", "written", "revision"])


def summary(figures: Path) -> pd.DataFrame:
    """The values that the verdicts rest on: `claims,bar,value,low,high,colour`, for the tables that the run has."""
    bars: list[tuple[str, str, Interval, str]] = []  # claims, bar, value, name of its colour
    for name in [name for name in claims()["table"].unique() if (figures / name).is_file()]:
        table = pd.read_csv(figures / name)
        if name == "01_zoos.csv":
            rows = rows_with(table, labels=_levels(table)[0], probe="linear", layer="final").drop_duplicates("encoder")
            bars += [("C1", LABELS[r["encoder"]], _interval(r, *TOP1), r["encoder"]) for _, r in rows.iterrows()]
        elif name == "02_icl_ap.csv":
            rows = rows_with(table, shots=table["shots"].max(), iou_type="bbox")
            bars += [
                ("C2", r["split"], _interval(r), r["split"]) for _, r in rows_with(rows, variant=ORACLE).iterrows()
            ]
            controls = {label: row_with(rows, split="base", variant=name) for name, label in UNINFORMATIVE.items()}
            bars += [("C2", label, _interval(row), "random") for label, row in controls.items()]
        elif name == "02_separability.csv":
            for split, stage in itertools.product(("base", "novel"), ("before", "after")):
                bars.append(("C3, C4", f"{split}\n{stage}", lift(table, stage, split, "knn").times(100), split))
        else:
            rows = pipeline_setting(table)[0].set_index("source")
            names = [source for source in ("sam", "sam2", "clip", "dinov2", "random") if source in rows.index]
            bars += [("C5", LABELS[source], _interval(rows.loc[source]), source) for source in names]
    rows = [(claims, bar, *value, COLOURS[colour]) for claims, bar, value, colour in bars]
    return pd.DataFrame(rows, columns=["claims", "bar", "value", "low", "high", "colour"])


# --------------------------------------------------------------------------------------------- the five comparisons


def compare_probes(table: pd.DataFrame) -> list[Comparison]:
    """C1, from `01_zoos.csv`: linear probes on what each encoder gives out, pooled as in the paper.

    Of models that were trained several times it is the mean, with the noise of training in its interval.
    """

    def top1(encoder: str, labels: str) -> Interval:
        return _interval(row_with(table, encoder=encoder, labels=labels, probe="linear", layer="final"), *TOP1)

    source, found = _source("01_zoos.csv", table), []
    semantic, masks = ("clip", "dinov2"), ("sam", "sam2")
    for labels in _levels(table):
        more, less = min(top1(name, labels) for name in semantic), max(top1(name, labels) for name in masks)
        statement = f"{labels}: the weaker of CLIP and DINOv2 above the better of SAM and SAM 2, top-1"
        factor = BETTER if labels == "category" else MISSING
        found.append(Comparison(statement, more, less, factor, source, semantic, masks))
    first = _levels(table)[0]
    newer, older, statement = top1("sam2", first), top1("sam", first), f"{first}: SAM 2 above SAM, top-1"
    return [*found, Comparison(statement, newer, older, BETTER, source, ("sam2",), ("sam",))]


def _levels(table: pd.DataFrame) -> list[str]:
    """The levels of label, that of the paper's kind first: drawings, or the classes of other data."""
    return sorted(table["labels"].unique(), key=lambda name: name == "category")


def compare_incontext(table: pd.DataFrame) -> list[Comparison]:
    """C2, from `02_icl_ap.csv`: box AP with the class oracle, most shots."""
    rows = rows_with(table, shots=table["shots"].max(), iou_type="bbox")
    base, novel = (_interval(row_with(rows, variant=ORACLE, split=split)) for split in ("base", "novel"))
    control = max(_interval(row_with(rows, variant=name, split="base")) for name in UNINFORMATIVE)
    words, source, sam = f"box AP at {table['shots'].max()} shots", _source("02_icl_ap.csv", table), ("sam",)
    return [
        Comparison(f"{words}: base above novel categories", base, novel, MISSING, source, sam, sam, TOLERANCE),
        Comparison(
            f"{words}, base: above references that tell nothing", base, control, MISSING, source, sam, sam, TOLERANCE
        ),
    ]


def compare_structure(
    table: pd.DataFrame, words: str, more: tuple[str, str], less: tuple[str, str]
) -> list[Comparison]:
    """C3 and C4, from `02_separability.csv`: every metric over shuffled labels at two pairs of stage and split."""
    source, sam, found = _source("02_separability.csv", table), ("sam",), []
    for m in sorted(table["metric"].unique(), key=lambda metric: (not metric.startswith("knn"), metric)):
        statement = f"{METRICS.get(m, m)} over shuffled labels, {words}"
        ends = lift(table, *more, m), lift(table, *less, m)
        found.append(Comparison(statement, *ends, MISSING, source, sam, sam, TOLERANCE))
    return found


def compare_sources(table: pd.DataFrame) -> list[Comparison]:
    """C5, from `03_pipeline_ap.csv`: mask AP with DINOv2 as the source of meaning above SAM and above random."""
    masks, shots = pipeline_setting(table)
    dinov2, random, sam = (_interval(row_with(masks, source=name)) for name in ("dinov2", "random", "sam"))
    words, source = f"mask AP at {shots} shots: DINOv2 above", _source("03_pipeline_ap.csv", table)
    both = ("sam", "dinov2")
    return [
        Comparison(f"{words} an untrained encoder", dinov2, random, BETTER, source, both),
        Comparison(f"{words} SAM's own features", dinov2, sam, BETTER, source, both, ("sam",)),
    ]


def pipeline_setting(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The mask rows of `03_pipeline_ap.csv` in the one setting that is judged, a row per source, and its shots.

    It is the paper's own, if it is there (SAM's proposals, no merging), with most references; a StudyError where no
    setting has dinov2, sam and random.
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
    return table[(table[list(values)] == pd.Series(values)).all(axis=1)]


def row_with(table: pd.DataFrame, **values: object) -> pd.Series:
    """The first row with these values; a StudyError names them where there is none."""
    rows = rows_with(table, **values)
    if rows.empty:
        wanted = ", ".join(f"{column}={value}" for column, value in values.items())
        raise StudyError(f"a table of this run has no row with {wanted}: run its notebook again by ./run_all.sh --only")
    return rows.iloc[0]


def lift(table: pd.DataFrame, stage: str, split: str, metric: str) -> Interval:
    """A metric above what shuffled labels give."""
    row = row_with(table, stage=stage, split=split, metric=metric)
    return Interval(*(row[column] - row["shuffled"] for column in ("value", "low", "high")))


def _interval(row: pd.Series, value: str = "AP", low: str = "low", high: str = "high") -> Interval:
    return Interval(row[value], row[low], row[high])


def _source(name: str, table: pd.DataFrame) -> str:
    return f"{name} ({table['seeds'].max()} seeds)" if "seeds" in table else name


AFTER = ("after", "base")
COMPARE: dict[str, Callable[[pd.DataFrame], list[Comparison]]] = {
    "C1": compare_probes,
    "C2": compare_incontext,
    "C3": lambda table: compare_structure(table, "base: after above before the MLP", AFTER, ("before", "base")),
    "C4": lambda table: compare_structure(table, "after the MLP: base above novel", AFTER, ("after", "novel")),
    "C5": compare_sources,
}
