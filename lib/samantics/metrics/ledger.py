"""The prediction ledger: what a reader expects before any result, and how near it came.

A guess is a number and how far it may be off, 19 times out of 20. There are five: the first comparison of each claim,
as `claims.csv` words it. They lie in `guesses.json` beside the run's figures, where a teacher can write a class's too:

    {"C1": {"guess": 30, "plus_minus": 20}, "C2": {"guess": 15, "plus_minus": 10}}
"""

import os
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
import pydantic
from scipy.stats import norm

from samantics.cache import write_json
from samantics.errors import StudyError
from samantics.metrics import claims
from samantics.metrics.intervals import Interval

FILE = "guesses.json"
SIGMAS = 1.96  # a guess's half-width in standard deviations


class Guess(pydantic.BaseModel):
    """A number and its 95 % half-width, in the claim's unit."""

    guess: float = pydantic.Field(allow_inf_nan=False)
    plus_minus: float = pydantic.Field(gt=0, allow_inf_nan=False)


FIELDS = list(Guess.model_fields)
GUESSES = pydantic.TypeAdapter(dict[str, Guess])


def read_guesses(figures: Path) -> dict[str, Guess]:
    """The guesses of a run by claim; none where none are written down.

    Raises:
        StudyError: the file is not as it should be.
    """
    path = figures / FILE
    try:
        return GUESSES.validate_json(path.read_bytes()) if path.is_file() else {}
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        what = " ".join([*map(str, fault["loc"]), fault["msg"].lower()])
        raise StudyError(f"{path}: {what}: correct it, or remove the file") from error


def form(figures: Path) -> Any:
    """Fields for the five guesses and a button that writes them; without a reader (papermill) the table of them."""
    found, known = read_guesses(figures), claims.claims()
    if "JPY_SESSION_NAME" not in os.environ:  # Jupyter's servers set it for the kernels that they start
        return known.set_index("claim")[["measure"]].join(_table(found))
    import ipywidgets

    fields, lines, note = {}, [], ipywidgets.Label()
    for claim, measure in zip(known["claim"], known["measure"], strict=True):
        start = found.get(claim, Guess(guess=0, plus_minus=20))
        fields[claim] = ipywidgets.FloatText(start.guess), ipywidgets.BoundedFloatText(start.plus_minus, min=0.1)
        lines += [ipywidgets.Label(f"{claim}: {measure}"), ipywidgets.HBox(fields[claim])]

    def save(_button: object) -> None:
        written = {claim: [field.value for field in pair] for claim, pair in fields.items()}
        write_json(figures / FILE, {claim: dict(zip(FIELDS, pair, strict=True)) for claim, pair in written.items()})
        note.value = f"written to {FILE}"

    button = ipywidgets.Button(description="Write down")
    button.on_click(save)
    return ipywidgets.VBox([*lines, button, note])


def _table(guesses: dict[str, Guess]) -> pd.DataFrame:
    return pd.DataFrame({claim: dict(guess) for claim, guess in guesses.items()}, FIELDS, dtype=float).T


def scores(figures: Path) -> pd.DataFrame:
    """`claim,guess,plus_minus,measured,low,high,hit,off,paper,verdict`, a row for each claim.

    `hit`: the measured value lies within the guess. `off`: the continuous ranked probability score (Gneiting and
    Raftery 2007) in the claim's unit, 0 at best; a wide guess costs as a wrong one does.
    """
    table = claims.judge(claims.evidence(figures)).join(_table(read_guesses(figures)), on="claim")
    z, sigma = (table["measured"] - table["guess"]) / table["plus_minus"] * SIGMAS, table["plus_minus"] / SIGMAS
    table["off"] = sigma * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - norm.pdf(0) * 2**0.5)
    table["hit"] = (abs(z) <= SIGMAS).map({True: "yes", False: "no"}).where(z.notna(), "")
    return table[["claim", *FIELDS, "measured", "low", "high", "hit", "off", "paper", "verdict"]]


def reveal(figures: Path, claim: str) -> str:
    """One line: the guess, what this run measured, and the paper's figure."""
    row = scores(figures).set_index("claim").loc[claim]
    guess = "no guess" if isnan(row["guess"]) else f"guess {row['guess']:g} ± {row['plus_minus']:g}"
    interval = claims.shown(Interval(row["measured"], row["low"], row["high"]))
    measured = claims.NOT_MEASURED if isnan(row["measured"]) else f"measured {interval}"
    return f"{claim}: {guess}, {measured}{' (within)' * (row['hit'] == 'yes')}; the paper: {row['paper']}"
