"""Do two runs agree? `python -m samantics compare OLD NEW` compares the tables of two folders of figures.

Tolerances. Where a number has an interval, the new number must lie within the old interval widened by half its width
on either side (by twice its width in notebook 02, whose model is trained within the run: the least difference in
rounding between two machines, or two numbers of threads, grows in it). Numbers without an interval (AP50 beside AP,
say) may move as far as their row's number with one, in proportion, or by a tenth of themselves, whichever is more.
Counts, rows, columns and the verdicts on the claims must be the same.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from samantics.errors import StudyError
from samantics.metrics.claims import KEYS

# of a table of differences; the verdicts are those of 04, and a p may move by orders of magnitude
EVIDENCE = KEYS, ["difference", "low", "high", "effect_of_interest"]
TABLES: dict[str, tuple[list[str], list[str]]] = {  # columns that name a row; those compared, where it is not all
    "01_probe_accuracy": (["encoder", "labels", "kind", "probe", "layer", "pooling"], []),
    "01_differences": EVIDENCE,
    "02_differences": EVIDENCE,
    "03_differences": EVIDENCE,
    "02_icl_ap": (["arm", "variant", "split", "shots", "artists", "iou_type"], []),
    "02_separability": (["stage", "split", "metric"], []),
    "03_pipeline_ap": (["proposals", "source", "merging", "shots", "iou_type"], []),
    "03_oracles": (["oracle", "iou_type"], []),
    "04_findings": (["claim"], ["verdict"]),  # its numbers are those of the other tables
}
INTERVALS = {  # column of a number: columns of its interval
    "top1": ("top1_low", "top1_high"),
    "top5": ("top5_low", "top5_high"),
    "AP": ("low", "high"),
    "value": ("low", "high"),
    "difference": ("low", "high"),
}
WIDENED = 0.5  # of the interval's width, on either side
WIDENED_TRAINED = 2.0  # where a model is trained within the run
RELATIVE = 0.1
OF_RANGE = 0.01  # of a column's range: what a number near 0 may always move by


def agree(old: Path, new: Path) -> bool:
    """Whether two folders of figures agree; what differs is printed, one line each; StudyError for other folders."""
    for folder in (old, new):
        if not any((folder / f"{name}.csv").is_file() for name in TABLES):
            raise StudyError(f"{folder} has no tables of a run: check the path")
    lines = differences(old, new)
    print("\n".join(lines) if lines else "the numbers and verdicts of both runs agree within their tolerances")
    both = sorted({path.name for path in old.glob("*.csv")} & {path.name for path in new.glob("*.csv")})
    same = sum((old / name).read_bytes() == (new / name).read_bytes() for name in both)
    print(f"{same} of {len(both)} tables are equal byte for byte")
    return not lines


def differences(old: Path, new: Path) -> list[str]:
    """One line for each real difference between the tables of two folders; a table that one of them lacks is one."""
    found = []
    for name, (keys, columns) in TABLES.items():
        paths = [folder / f"{name}.csv" for folder in (old, new)]
        missing = [path for path in paths if not path.is_file()]
        if len(missing) == 1:
            found.append(f"{missing[0]} is missing")
        elif not missing:
            before, after = (pd.read_csv(path) for path in paths)
            if columns:
                before, after = (table.filter([*keys, *columns]) for table in (before, after))
            widened = WIDENED_TRAINED if name.startswith("02") else WIDENED
            found += [f"{name}: {line}" for line in table_differences(before, after, keys, widened)]
    return found


def table_differences(old: pd.DataFrame, new: pd.DataFrame, keys: list[str], widened: float = WIDENED) -> list[str]:
    """One line for each number of `new` that is outside the tolerance around `old`, and for each other verdict."""
    if list(old.columns) != list(new.columns):
        return [f"columns {', '.join(new.columns)} instead of {', '.join(old.columns)}"]
    old, new = old.set_index(keys).sort_index(), new.set_index(keys).sort_index()
    if not old.index.equals(new.index):
        odd = old.index.symmetric_difference(new.index)
        return [f"{len(odd)} rows are in one run only, such as {odd[0]}" if len(odd) else "a row occurs twice"]
    found = []
    for row in old.index[old["verdict"] != new["verdict"]] if "verdict" in old else ():
        found.append(f"{row}: the verdict is {new['verdict'][row]!r}, expected {old['verdict'][row]!r}")
    bounds = {bound for pair in INTERVALS.values() for bound in pair}
    for column in old.select_dtypes("number").columns.difference(bounds, sort=False):
        value, (low, high) = new[column].to_numpy(float), _allowed(old, column, widened)
        inside = (low <= value) & (value <= high) | np.isnan(value) & old[column].isna()
        for row in np.flatnonzero(~inside):
            found.append(f"{old.index[row]}: {column} is {value[row]:.4g}, expected {low[row]:.4g} to {high[row]:.4g}")
    return found


def _allowed(old: pd.DataFrame, column: str, widened: float) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value that each row of a column may have."""
    value = old[column].to_numpy(float)
    if old[column].dtype.kind == "i" or np.isnan(value).all():
        return value, value
    slack = OF_RANGE * (np.nanmax(value) - np.nanmin(value))
    margin = np.maximum(RELATIVE * np.abs(value), slack)
    if column in INTERVALS and INTERVALS[column][0] in old:
        low, high = (old[name].to_numpy(float) for name in INTERVALS[column])
        margin = np.where(np.isnan(low), margin, np.maximum(widened * (high - low), slack))
        return np.fmin(low, value) - margin, np.fmax(high, value) + margin
    for measured, bounds in INTERVALS.items():
        if measured in old and bounds[0] in old:
            low, high = (old[name].to_numpy(float) for name in bounds)
            known = np.abs(old[measured].to_numpy(float))
            share = np.abs(value) / np.where(known > 0, known, np.inf)
            margin = np.fmax(margin, (0.5 + widened) * (high - low) * np.maximum(share, 1))
    return value - margin, value + margin
