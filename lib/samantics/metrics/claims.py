"""The five claims judged from what notebooks 01 to 03 measured: their tables `NN_differences.csv`, and nothing else.

Each row of such a table is a manipulation check (can the instrument see the effect at all?) or a comparison, with the
smallest effect of interest that was written down before the run. `judge` gives each claim one verdict:

- not testable: a check stays below its aim, or there is none, or the claim that this one builds on is not supported;
- supported: every comparison is above its smallest effect of interest;
- not supported: a comparison is below it;
- undecided: the intervals allow both.

"Above" and "below" are meant with 95 % confidence over the five claims together (Holm 1979), and hold on to the verdict
only where neither another bootstrap nor another processor could turn it (`BOOTSTRAP`, `PROCESSOR`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import norm

from samantics.errors import StudyError
from samantics.metrics.intervals import COVERAGE, Difference, Interval

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PAPER_PROBE = {"sam": (11.06, 25.37), "sam2": (23.16, 44.44), "clip": (73.92, 92.89), "dinov2": (77.43, 93.78)}
"""ImageNet-1k top-1 and top-5 in percent, as the paper reports them."""

KEYS = ["claim", "role", "more", "less", "level", "probe"]  # what names a row of evidence
COLUMNS = [*KEYS, "difference", "low", "high", "p", "effect_of_interest"]
BOOTSTRAP = 0.04  # of an interval's width: how far its ends move with the seed of 2,000 resamples (two standard errors)
PROCESSOR = 0.5  # where a model is trained within the run: kernels elsewhere sum in another order and train another one
NOT_MEASURED = "not measured"


def claims() -> pd.DataFrame:
    """The five claims: `claim,short,statement,measure,paper,table,trained,needs`.

    `measure` is the claim's first comparison in words, `trained` whether a model is trained within the run, `needs` the
    claim that must be supported before this one can be tested.
    """
    return pd.read_csv(ASSETS / "claims.csv", keep_default_na=False)


def evidence_row(
    claim: str, role: str, more: str, less: str, level: str, probe: str, difference: Difference | Interval | float,
    effect_of_interest: float,
) -> dict[str, Any]:  # fmt: skip
    """A row of `NN_differences.csv`.

    Args:
        claim: C1 to C5.
        role: `check` or `comparison`.
        more, less: what is compared; `less` is empty where a check is a value and not a difference.
        level: of the labels or classes (artist, base, base - novel, ...).
        probe: what was measured, with its unit where that is not percent.
        difference: `more` minus `less`, paired; a check may be a number alone.
        effect_of_interest: the smallest that counts, in the same unit; a check's aim.
    """
    if role not in ("check", "comparison"):
        raise ValueError(f"a row of evidence is a check or a comparison, not {role!r}")
    numbers = (difference,) if isinstance(difference, float | int) else tuple(difference)
    value, low, high, p = (*numbers, *(math.nan,) * (4 - len(numbers)))
    return dict(
        zip(COLUMNS, (claim, role, more, less, level, probe, value, low, high, p, effect_of_interest), strict=True)
    )


def evidence(figures: Path) -> pd.DataFrame:
    """All rows of the tables `NN_differences.csv` that a folder of figures has, with `COLUMNS`.

    Raises:
        StudyError: a table lacks a column.
    """
    found = [pd.DataFrame(columns=COLUMNS)]
    for path in [figures / name for name in claims()["table"].unique() if (figures / name).is_file()]:
        table = pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in COLUMNS[6:]})
        if missing := [name for name in COLUMNS if name not in table]:
            raise StudyError(f"{path} has no column {missing[0]}: run notebook {path.name[:2]} again")
        found.append(table[COLUMNS])
    return pd.concat([table for table in found if len(table)] or found, ignore_index=True)


def findings(figures: Path) -> pd.DataFrame:
    """The verdicts of a run: `judge` of its `evidence`."""
    return judge(evidence(figures))


def judge(rows: pd.DataFrame, bootstrap: float = BOOTSTRAP, processor: float = PROCESSOR) -> pd.DataFrame:
    """One verdict for each claim.

    Args:
        rows: evidence, with `COLUMNS`.
        bootstrap, processor: shares of an interval's width by which it may move without turning a verdict.

    Returns:
        `claim,statement,check,check_value,paper,measured,low,high,effect_of_interest,verdict,source`. `check` is the
        one that reaches least of its aim, `measured` the claim's first comparison; both are empty where there is none.
    """
    known = claims()
    slack = known["trained"].map({"yes": max(bootstrap, processor), "no": bootstrap})
    found = [
        _first_verdict(rows[rows["claim"] == claim], share) for claim, share in zip(known["claim"], slack, strict=True)
    ]
    table = pd.concat([known[["claim", "statement", "paper", "needs"]], pd.DataFrame(found)], axis=1)
    unclear = pd.Series(holm(table["p"])) > 1 - COVERAGE
    table.loc[unclear & table["verdict"].isin(["supported", "not supported"]), "verdict"] = "undecided"
    verdicts = dict(zip(table["claim"], table["verdict"], strict=True))
    untold = [bool(claim) and verdicts[claim] != "supported" for claim in table["needs"]]
    table.loc[pd.Series(untold) & (table["verdict"] != NOT_MEASURED), "verdict"] = "not testable"
    names = ["claim", "statement", "check", "check_value", "paper", "measured", "low", "high", "effect_of_interest"]
    return table.assign(source=known["table"])[[*names, "verdict", "source"]]


def _first_verdict(rows: pd.DataFrame, slack: float) -> dict[str, Any]:
    """What a claim's rows say by themselves: numbers to show, the verdict they lean to, and its p.

    All comparisons must be above their effects for a yes; one below is enough for a no, so its p counts as many times.
    """
    checks, compared = (rows[rows["role"] == role].to_dict("records") for role in ("check", "comparison"))
    weakest = min(checks, key=lambda row: row["difference"] / (row["effect_of_interest"] or 1e-9), default=None)
    first = compared[0] if compared else dict.fromkeys(COLUMNS, math.nan)
    numbers = {"check": named(weakest), "check_value": weakest["difference"] if weakest else math.nan}
    numbers |= {"measured": first["difference"]} | {name: first[name] for name in ("low", "high", "effect_of_interest")}
    if rows.empty:
        return numbers | {"verdict": NOT_MEASURED, "p": 1.0}
    if not checks or not compared or not all(row["difference"] >= row["effect_of_interest"] for row in checks):
        return numbers | {"verdict": "not testable", "p": 1.0}
    above = max(chance(row, 1, slack) for row in compared)
    below = min(1.0, len(compared) * min(chance(row, -1, slack) for row in compared))
    return numbers | {"verdict": "supported" if above < below else "not supported", "p": min(above, below)}


def chance(row: dict[str, Any], side: int, slack: float = 0.0) -> float:
    """Two-sided p of a difference against its smallest effect of interest; 1 on the other side of it.

    It is below 0.05 exactly where the 95 % interval, moved by `slack` times its width, lies above (`side` 1) or below
    (-1) the effect: half of the interval counts as 1.96 standard errors. An interval without width gives 0 or 1.
    """
    distance = side * (row["difference"] - row["effect_of_interest"]) - slack * (row["high"] - row["low"])
    half = row["difference"] - row["low"] if side > 0 else row["high"] - row["difference"]
    if not half > 0:
        return float(not distance > 0)
    return min(1.0, 2 * float(norm.sf(norm.ppf((1 + COVERAGE) / 2) * distance / half)))


def holm(chances: Sequence[float]) -> list[float]:
    """p-values adjusted for all being looked at together (Holm 1979): the k-th smallest of n times n - k + 1."""
    adjusted, highest = [1.0] * len(chances), 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        highest = max(highest, (len(chances) - rank) * chances[place])
        adjusted[place] = min(1.0, highest)
    return adjusted


def named(row: dict[str, Any] | None) -> str:
    """What a row compares, in words: `dinov2 minus random (artist, linear)`."""
    if row is None:
        return ""
    pair = " minus ".join(str(row[end]) for end in ("more", "less") if row[end])
    return f"{pair} ({', '.join(str(row[name]) for name in ('level', 'probe') if row[name])})"


def shown(value: Interval) -> str:
    """An interval as text: percent and AP with one digit, shares with two."""
    return format(value, ".1f" if abs(value.value) >= 1 else ".2f")
