"""The five claims judged from the tables of a run. Each rule is a comparison with a margin, fixed before any result.

A claim consists of comparisons "more is above less". One holds when the lower end of the 95 % interval of ``more`` is
above 0 and above the upper end of the interval of ``less`` times a factor: 2 where the paper says that something is
missing ("far less", "fails", "not there"), 1 where it says that one thing is better than another. A claim is
*supported* when all its comparisons hold, *partly* when some do, *not supported* when none does, and *not measured*
without its table. A comparison stays *open* where a model that is no good at its own trade could have made the
outcome: it holds, but the model of ``less`` is one, or it fails, and the model of ``more`` is one. Open comparisons
count as not holding beside others that do, and a claim with no other is *not measured*. No good is a model of the
pocket zoo that does not reach four fifths of an aim that was set before it was trained (``AIMS``); the four fifths were
set after the first zoo had been seen and before any claim was judged with them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pandas as pd

from samantics.errors import StudyError
from samantics.metrics.intervals import Interval

MISSING = 2.0  # factor where the paper says that something is missing
BETTER = 1.0  # factor where it says that one thing is better than another
ENOUGH = 0.8  # share of an aim from which on a model counts as good at its trade

PAPER_PROBE = {"sam": (11.06, 25.37), "sam2": (23.16, 44.44), "clip": (73.92, 92.89), "dinov2": (77.43, 93.78)}
"""ImageNet-1k top-1 and top-5 in percent, as the paper reports them."""

AIMS = {  # on pictures no model has seen, percent: rows of 00_zoo_quality.csv
    ("sam", "IoU (%), click at the centre, best of three masks"): 75,
    ("sam", "IoU (%), box"): 85,
    ("sam2", "IoU (%), click at the centre, best of three masks"): 75,
    ("sam2", "IoU (%), box"): 85,
    ("clip", "zero-shot category (%), train drawings"): 70,
    ("dinov2", "linear probe, drawing (%)"): 40,
}

CEILINGS = {  # what stands in the way of an aim, by the model: rows of the same table
    "sam": "IoU (%), the true mask at the decoder's resolution",
    "sam2": "IoU (%), the true mask at the decoder's resolution",
    "clip": "linear probe, category of the same drawings (%)",
}

METRICS = {"silhouette": "silhouette", "knn": "kNN accuracy", "nmi": "NMI of k-means", "linear": "linear probe"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One thing that must be above another for a claim to hold.

    Attributes:
        statement: what is compared, in words.
        more, less: the two values, in the same unit.
        factor: how many times ``less`` must be exceeded.
        source: the table they come from.
        more_from, less_from: the models that ``more`` and ``less`` rest on.
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
        """``more - less``, its interval from the far ends of both (wider than a paired one would be)."""
        return difference(self.more, self.less)

    @property
    def holds(self) -> bool:
        """Whether the whole interval of ``more`` is above ``factor`` times that of ``less``, and above 0."""
        return self.more.low > max(0.0, self.factor * self.less.high)

    def is_open(self, unfit: Collection[str]) -> bool:
        """Whether the weakness of an ``unfit`` model could have made this outcome."""
        return bool(set(self.less_from if self.holds else self.more_from) & set(unfit))


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper and how it is judged.

    Attributes:
        name: ``C1`` to ``C5``.
        statement: the claim in one sentence.
        measure: what its one number is.
        paper: the paper's figures.
        table: the table it is judged from.
        compare: from that table to its comparisons; the first gives the claim's number.
    """

    name: str
    statement: str
    measure: str
    paper: str
    table: str
    compare: Callable[[pd.DataFrame], list[Comparison]]

    def comparisons(self, figures: Path) -> list[Comparison]:
        """Its comparisons in a run's folder of figures; none when the table is not there."""
        path = figures / self.table
        return self.compare(pd.read_csv(path)) if path.is_file() else []


def shown(value: Interval) -> str:
    """An interval as text: percent and AP with one digit, shares with two."""
    return format(value, ".1f" if abs(value.value) >= 1 else ".2f")


def difference(more: Interval, less: Interval) -> Interval:
    """``more - less`` with the interval that their far ends give."""
    return Interval(more.value - less.value, more.low - less.high, more.high - less.low)


def verdict(comparisons: list[Comparison], unfit: Collection[str] = ()) -> str:
    """``supported``, ``partly``, ``not supported`` or ``not measured``, by the rule at the head of this module."""
    decided = [comparison for comparison in comparisons if not comparison.is_open(unfit)]
    if not decided:
        return "not measured"
    held = sum(comparison.holds for comparison in decided)
    return {len(comparisons): "supported", 0: "not supported"}.get(held, "partly")


def zoo_aims(figures: Path) -> pd.DataFrame:
    """``encoder, measure, value, aim, reached, ceiling``: the pocket zoo at its trades; empty where not measured.

    ``ceiling``: what the model could reach at best, as :data:`CEILINGS` says; empty where no bound is known.
    """
    path = figures / "00_zoo_quality.csv"
    columns = ["encoder", "measure", "value", "aim", "reached", "ceiling"]
    if not path.is_file():
        return pd.DataFrame(columns=columns)
    found = pd.read_csv(path).set_index(["encoder", "measure"])["value"].to_dict()
    rows = [
        (*key, found[key], aim, found[key] / aim, found.get((key[0], CEILINGS.get(key[0])), math.nan))
        for key, aim in AIMS.items()
    ]
    return pd.DataFrame(rows, columns=columns)


def unfit_models(figures: Path) -> tuple[str, ...]:
    """The models of the pocket zoo that do not reach :data:`ENOUGH` of an aim."""
    aims = zoo_aims(figures)
    return tuple(aims.loc[aims["reached"] < ENOUGH, "encoder"].unique())


def evidence(figures: Path) -> pd.DataFrame:
    """All comparisons of all claims: ``claim,comparison,more,less,factor,holds,open,source``."""
    unfit = unfit_models(figures)
    rows = [
        {
            "claim": claim.name,
            "comparison": comparison.statement,
            "more": shown(comparison.more),
            "less": shown(comparison.less),
            "factor": comparison.factor,
            "holds": comparison.holds,
            "open": comparison.is_open(unfit),
            "source": comparison.source,
        }
        for claim in CLAIMS
        for comparison in claim.comparisons(figures)
    ]
    return pd.DataFrame(rows, columns=["claim", "comparison", "more", "less", "factor", "holds", "open", "source"])


def findings(figures: Path) -> pd.DataFrame:
    """The verdicts: ``claim,statement,paper,measured,low,high,verdict,source``; ``measured`` is empty where unknown."""
    rows = []
    unfit = unfit_models(figures)
    for claim in CLAIMS:
        comparisons = claim.comparisons(figures)
        value = headline(claim, comparisons) if comparisons else Interval(*[float("nan")] * 3)
        rows.append(
            {
                "claim": claim.name,
                "statement": f"{claim.statement} Measured: {claim.measure}.",
                "paper": claim.paper,
                "measured": value.value,
                "low": value.low,
                "high": value.high,
                "verdict": verdict(comparisons, unfit),
                "source": comparisons[0].source if comparisons else claim.table,
            }
        )
    return pd.DataFrame(rows)


def by_factor(figures: Path, factors: Sequence[float] = (1.0, 1.5, 2.0, 3.0)) -> pd.DataFrame:
    """The verdicts if every comparison had to hold by this factor: rows are claims, columns factors."""
    rows, unfit = {}, unfit_models(figures)
    for claim in CLAIMS:
        comparisons = claim.comparisons(figures)
        rows[claim.name] = [
            verdict([dataclasses.replace(c, factor=factor) for c in comparisons], unfit) for factor in factors
        ]
    return pd.DataFrame.from_dict(rows, orient="index", columns=[f"{factor:g}x" for factor in factors])


def origins(figures: Path) -> pd.DataFrame:
    """Where the judged tables come from: ``table,notebook,seed,revision,written``; empty where there is no table."""
    rows = []
    for name in sorted({claim.table for claim in CLAIMS}):
        note = (figures / name).with_suffix(".json")
        facts = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        revision = str(facts.get("git_revision", ""))[:8]
        row = {"table": name} | {key: facts.get(key, "") for key in ("notebook", "seed", "written")}
        rows.append(row | {"revision": revision})
    return pd.DataFrame(rows)


def headline(claim: Claim, comparisons: list[Comparison]) -> Interval:
    """The one number of a claim: the gap of its first comparison, for C5 the AP itself."""
    return comparisons[0].more if claim.name == "C5" else comparisons[0].gap


# --------------------------------------------------------------------------------------------- the five comparisons


def compare_probes(table: pd.DataFrame) -> list[Comparison]:
    """C1, from ``01_zoos.csv``: linear probes on what each encoder gives out, pooled as in the paper;
    of models that were trained several times the mean, with the noise of training in its interval."""

    def top1(encoder: str, labels: str) -> Interval:
        row = row_with(table, encoder=encoder, labels=labels, probe="linear", layer="final")
        return Interval(row["top1"], row["top1_low"], row["top1_high"])

    source = _source("01_zoos.csv", table)
    comparisons = []
    for labels in sorted(table["labels"].unique(), key=lambda name: name == "category"):
        semantic = min(top1("clip", labels), top1("dinov2", labels))
        masks = max(top1("sam", labels), top1("sam2", labels))
        statement = f"{labels}: the weaker of CLIP and DINOv2 above the better of SAM and SAM 2, top-1"
        factor = MISSING if labels != "category" else BETTER
        comparisons.append(Comparison(statement, semantic, masks, factor, source, ("clip", "dinov2"), ("sam", "sam2")))
    first = comparisons[0].statement.split(":")[0]
    return [
        *comparisons,
        Comparison(
            f"{first}: SAM 2 above SAM, top-1",
            top1("sam2", first),
            top1("sam", first),
            BETTER,
            source,
            ("sam2",),
            ("sam",),
        ),
    ]


def compare_incontext(table: pd.DataFrame) -> list[Comparison]:
    """C2, from ``02_icl_ap.csv``: box AP with the class oracle, most shots."""
    shots = int(table["shots"].max())

    def ap(variant: str, split: str) -> Interval:
        row = row_with(table, variant=variant, split=split, shots=shots, iou_type="bbox")
        return Interval(row["AP"], row["low"], row["high"])

    source = _source("02_icl_ap.csv", table)
    base, novel = ap("class_oracle", "base"), ap("class_oracle", "novel")
    control = max(ap(name, "base") for name in ("wrong_reference", "random_reference"))
    return [
        Comparison(f"{words}: {statement}", base, less, MISSING, source, ("sam",), ("sam",))
        for words, statement, less in (
            (f"box AP at {shots} shots", "base above novel categories", novel),
            (f"box AP at {shots} shots, base", "above references that tell nothing", control),
        )
    ]


def compare_stages(table: pd.DataFrame) -> list[Comparison]:
    """C3, from ``02_separability.csv``: class structure after the MLP above that before it, base categories."""
    source = _source("02_separability.csv", table)
    return [
        Comparison(
            f"{METRICS.get(metric, metric)} over shuffled labels, base: after above before the MLP",
            lift(table, "after", "base", metric),
            lift(table, "before", "base", metric),
            MISSING,
            source,
            ("sam",),
            ("sam",),
        )
        for metric in _metrics(table)
    ]


def compare_splits(table: pd.DataFrame) -> list[Comparison]:
    """C4, from ``02_separability.csv``: class structure after the MLP, base above novel categories."""
    source = _source("02_separability.csv", table)
    return [
        Comparison(
            f"{METRICS.get(metric, metric)} over shuffled labels, after the MLP: base above novel",
            lift(table, "after", "base", metric),
            lift(table, "after", "novel", metric),
            MISSING,
            source,
            ("sam",),
            ("sam",),
        )
        for metric in _metrics(table)
    ]


def compare_sources(table: pd.DataFrame) -> list[Comparison]:
    """C5, from ``03_pipeline_ap.csv``: mask AP with DINOv2 as the source of meaning above SAM and above random."""
    masks, shots = pipeline_setting(table)

    def ap(name: str) -> Interval:
        row = row_with(masks, source=name)
        return Interval(row["AP"], row["low"], row["high"])

    source = _source("03_pipeline_ap.csv", table)
    return [
        Comparison(
            f"mask AP at {shots} shots: DINOv2 above {words}",
            ap("dinov2"),
            ap(name),
            BETTER,
            source,
            ("sam", "dinov2"),
            ("sam",) if name == "sam" else (),
        )
        for name, words in (("random", "an untrained encoder"), ("sam", "SAM's own features"))
    ]


def pipeline_setting(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The mask rows of ``03_pipeline_ap.csv`` in the one setting that is judged, a row per source, and its shots.

    The paper's own, if it is there: SAM's proposals, no merging, most references.

    Raises:
        StudyError: no setting has dinov2, sam and random.
    """
    masks = table[table["iou_type"] == "segm"]
    settings = masks[["proposals", "merging", "shots"]].drop_duplicates().itertuples(index=False)
    complete = []
    for proposals, merging, shots in settings:
        rows = masks[(masks["proposals"] == proposals) & (masks["merging"] == merging) & (masks["shots"] == shots)]
        if {"dinov2", "sam", "random"} <= set(rows["source"]):
            complete.append(((proposals == "sam", merging == "none", int(shots)), rows))
    if not complete:
        raise StudyError("03_pipeline_ap.csv has no setting with dinov2, sam and random: run notebook 03 again")
    (_, _, most_shots), chosen = max(complete, key=lambda pair: pair[0])
    return chosen, most_shots


CLAIMS = (
    Claim(
        "C1",
        "SAM and SAM 2 features tell classes apart far worse than CLIP's and DINOv2's, and SAM 2's better than SAM's.",
        "top-1 of the weaker of CLIP and DINOv2 minus the better of SAM and SAM 2, points",
        f"{PAPER_PROBE['clip'][0] - PAPER_PROBE['sam2'][0]:.1f} points (ImageNet-1k)",
        "01_zoos.csv",
        compare_probes,
    ),
    Claim(
        "C2",
        "In-context learning on frozen SAM works on classes seen in tuning and fails on unseen ones.",
        "box AP on base minus on novel categories, points",
        "shown in pictures",
        "02_icl_ap.csv",
        compare_incontext,
    ),
    Claim(
        "C3",
        "SAM's mask tokens carry no class structure before the learned MLP; its output does.",
        "kNN accuracy over shuffled labels, after minus before the MLP, base categories",
        "shown as t-SNE",
        "02_separability.csv",
        compare_stages,
    ),
    Claim(
        "C4",
        "That class structure covers the tuned classes only; unseen classes stay mixed.",
        "kNN accuracy over shuffled labels after the MLP, base minus novel categories",
        "shown as t-SNE",
        "02_separability.csv",
        compare_splits,
    ),
    Claim(
        "C5",
        "Training-free SAM + DINOv2 gives class-aware instances of classes never trained on.",
        "mask AP with DINOv2 as the source of meaning",
        "mask AP 11.3, box AP 13.3 (COCO val2017)",
        "03_pipeline_ap.csv",
        compare_sources,
    ),
)


def row_with(table: pd.DataFrame, **values: object) -> pd.Series:
    """The first row with these values.

    Raises:
        StudyError: there is none.
    """
    chosen = table
    for column, value in values.items():
        chosen = chosen[chosen[column] == value]
    if chosen.empty:
        wanted = ", ".join(f"{column}={value}" for column, value in values.items())
        raise StudyError(f"a table of this run has no row with {wanted}: run its notebook again by ./run_all.sh --only")
    return chosen.iloc[0]


def _metrics(table: pd.DataFrame) -> list[str]:
    return sorted(table["metric"].unique(), key=lambda metric: (not metric.startswith("knn"), metric))


def lift(table: pd.DataFrame, stage: str, split: str, metric: str) -> Interval:
    """A metric above what shuffled labels give."""
    row = row_with(table, stage=stage, split=split, metric=metric)
    return Interval(*(row[column] - row["shuffled"] for column in ("value", "low", "high")))


def _source(name: str, table: pd.DataFrame) -> str:
    if "seeds" not in table:
        return name
    return f"{name} ({table['seeds'].max()} seeds)"
