"""The five claims judged from what notebooks 01 to 03 measured: their tables `NN_differences.csv`, and nothing else.

Each row of such a table is a manipulation check (can the instrument see the effect at all?) or a comparison, with the
smallest effect of interest that was written down before the run. `judge` gives each claim one verdict:

- not testable: a check stays below its aim, or there is none, or the claim that this one builds on is not supported;
- supported: every comparison is above its smallest effect of interest;
- not supported: a comparison is below it;
- undecided: the intervals allow both; or the verdict turns with another seed (of the bootstrap, or with one seed of
  references or probes left out), or could with another processor.

"Above" and "below" are meant with 95 % confidence over the five claims together (Holm 1979).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import norm

from samantics.cache import ASSETS
from samantics.errors import StudyError
from samantics.metrics.intervals import COVERAGE, Difference, Interval

PAPER_PROBE = {"sam": (11.06, 25.37), "sam2": (23.16, 44.44), "clip": (73.92, 92.89), "dinov2": (77.43, 93.78)}
"""ImageNet-1k top-1 and top-5 in percent, as the paper reports them."""

KEYS = ["claim", "role", "more", "less", "level", "probe"]  # what names a row of evidence
COLUMNS = [*KEYS, "difference", "low", "high", "p", "effect_of_interest"]
NUMBERS = ["difference", "low", "high", "effect_of_interest"]
ROLES = ("check", "comparison")
PROCESSOR = 0.5  # where a model is trained within the run: kernels elsewhere sum in another order and train another one
ENCODED = 0.1  # where only features are computed, which other kernels round otherwise
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
        claim, role: C1 to C5; `check` or `comparison`.
        more, less: what is compared; `less` is empty where a check is a value and not a difference.
        level, probe: of the labels or classes (artist, base, base - novel, ...); what was measured.
        difference: `more` minus `less`, paired; a check may be a number alone.
        effect_of_interest: the smallest that counts, in the same unit; a check's aim.
    """
    if role not in ROLES:
        raise ValueError(f"a row of evidence is a check or a comparison, not {role!r}")
    numbers: list[Any] = [difference] if isinstance(difference, float | int) else list(difference[:4])
    numbers += [math.nan] * (4 - len(numbers))
    cells = [claim, role, more, less, level, probe, *numbers, effect_of_interest]
    others = getattr(difference, "others", None)
    return dict(zip(COLUMNS, cells, strict=True)) | {"others": json.dumps(others) if others else ""}


def evidence(figures: Path) -> pd.DataFrame:
    """All rows of the tables `NN_differences.csv` that a folder of figures has, with `COLUMNS` and `others`.

    Raises:
        StudyError: a table lacks a column.
    """
    found = []
    for path in [figures / name for name in claims()["table"].unique() if (figures / name).is_file()]:
        table = pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in COLUMNS[6:]})
        if missing := [name for name in COLUMNS if name not in table]:
            raise StudyError(f"{path} has no column {missing[0]}: run notebook {path.name[:2]} again")
        if len(table):
            found.append(table.reindex(columns=[*COLUMNS, "others"], fill_value=""))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=[*COLUMNS, "others"])


def judge(rows: pd.DataFrame, processor: float = PROCESSOR) -> pd.DataFrame:
    """One verdict for each claim.

    Args:
        rows: evidence, with `COLUMNS` and `others`.
        processor: share of an interval's width by which it may move without turning the verdict of a claim whose model
            is trained within the run; of the others it may move by `ENCODED` at most.

    Returns:
        `claim,statement,check,check_value,paper,measured,low,high,effect_of_interest,verdict,source`. `check` is the
        one that reaches least of its aim, `measured` the claim's first comparison; both are empty where there is none.
    """
    by_seed, known, table = verdicts_by_seed(rows, processor), claims(), []
    verdicts = by_seed["as drawn"].where(by_seed.nunique(axis=1) == 1, "undecided").to_dict()
    for claim, builds_on in zip(known["claim"], known["needs"], strict=True):
        if builds_on and verdicts[builds_on] != "supported" and verdicts[claim] != NOT_MEASURED:
            verdicts[claim] = "not testable"
        own = rows[rows["claim"] == claim]
        checks, compared = (own[own["role"] == role].to_dict("records") for role in ROLES)
        check = min(checks, key=lambda row: row["difference"] / (row["effect_of_interest"] or 1e-9), default=None)
        reached = [named(check), check["difference"]] if check else ["", math.nan]
        table.append(reached + [compared[0][name] if compared else math.nan for name in NUMBERS])
    found = pd.DataFrame(table, columns=["check", "check_value", "measured", *NUMBERS[1:]])
    found.insert(2, "paper", known["paper"])
    return known[["claim", "statement"]].join(found).assign(verdict=known["claim"].map(verdicts), source=known["table"])


def verdicts_by_seed(rows: pd.DataFrame, processor: float = PROCESSOR) -> pd.DataFrame:
    """What each claim's own rows say (index `claim`): as drawn, and under every other seed that the rows know.

    Args:
        rows, processor: as in `judge`.
    """
    others = [json.loads(text or "{}") for text in rows["others"]]
    ends, found = ["difference", "low", "high"], {"as drawn": _verdicts(rows, processor)}
    for name in dict.fromkeys(name for known in others for name in known):
        drawn = [known.get(name, row) for known, row in zip(others, rows[ends].to_numpy().tolist(), strict=True)]
        found[name] = _verdicts(rows.assign(**pd.DataFrame(drawn, rows.index, ends)), processor)
    return pd.DataFrame(found, index=pd.Index(claims()["claim"]))


def _verdicts(rows: pd.DataFrame, processor: float) -> list[str]:
    """The verdict on each claim, by its rows alone: what they lean to, if that is clear when all claims are tested."""
    slack = {"yes": processor, "no": min(ENCODED, processor)}
    known = zip(claims()["claim"], claims()["trained"], strict=True)
    leaning, chances = zip(*(_leaning(rows[rows["claim"] == c], slack[trained]) for c, trained in known), strict=True)
    clear = [p <= 1 - COVERAGE for p in holm(chances)]
    decided = ("supported", "not supported")
    return ["undecided" if lean in decided and not sure else lean for lean, sure in zip(leaning, clear, strict=True)]


def _leaning(rows: pd.DataFrame, slack: float) -> tuple[str, float]:
    """The verdict that a claim's rows lean to by themselves, and its p."""
    checks, compared = (rows[rows["role"] == role] for role in ROLES)
    if rows.empty:
        return NOT_MEASURED, 1.0
    if checks.empty or compared.empty or not (checks["difference"] >= checks["effect_of_interest"]).all():
        return "not testable", 1.0
    sides = [[chance(row, side, slack) for row in compared.to_dict("records")] for side in (1, -1)]
    # all must be above their effects for a yes; one below is enough for a no, so its p counts as many times
    above, below = max(sides[0]), min(1.0, len(compared) * min(sides[1]))
    return "supported" if above < below else "not supported", min(above, below)


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


def named(row: Any) -> str:
    """What a row compares, in words: `dinov2 minus random (artist, linear)`."""
    pair = " minus ".join(str(row[end]) for end in ("more", "less") if row[end])
    return f"{pair} ({', '.join(str(row[name]) for name in ('level', 'probe') if row[name])})"


def shown(value: Interval) -> str:
    """An interval as text: percent and AP with one digit, shares with two."""
    return format(value, ".1f" if abs(value.value) >= 1 else ".2f")
