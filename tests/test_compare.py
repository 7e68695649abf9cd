from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from compare import agree, differences, table_differences

KEYS = ["encoder"]
OLD = pd.DataFrame(
    {
        "encoder": ["sam", "clip"],
        "top1": [10.0, 70.0],
        "top1_low": [8.0, 66.0],
        "top1_high": [12.0, 74.0],
        "dim": [160, 160],
    }
)


def changed(column: str, values: list[float]) -> list[str]:
    return table_differences(OLD, OLD.assign(**{column: values}), KEYS)


def test_equal_tables_in_any_order_agree() -> None:
    assert table_differences(OLD, OLD.iloc[::-1], KEYS) == []


@pytest.mark.parametrize(
    ("top1", "count"), [([13.9, 63.0], 0), ([14.1, 70.0], 1), ([5.9, 78.5], 2), ([float("nan"), 70.0], 1)]
)
def test_numbers_may_leave_their_interval_by_half_its_width(top1: list[float], count: int) -> None:
    assert len(changed("top1", top1)) == count


def test_counts_are_the_same() -> None:
    assert changed("dim", [160, 161]) == ["clip: dim is 161, expected 160 to 160"]


def test_a_number_without_interval_moves_as_far_as_its_row_s_number_with_one() -> None:
    table = pd.DataFrame({"k": ["a", "b"], "AP": [10.0, 40.0], "AP50": [20.0, 60.0]})
    table = table.assign(low=[8.0, 40.0], high=[12.0, 40.0])
    within = table.assign(AP50=[27.9, 65.9])  # (12 - 8) * 20 / 10 either way; nothing but a tenth where AP is certain
    assert table_differences(table, within, ["k"]) == []
    assert table_differences(table, table.assign(AP50=[28.1, 66.1]), ["k"]) == [
        "a: AP50 is 28.1, expected 12 to 28",
        "b: AP50 is 66.1, expected 54 to 66",
    ]


def test_other_rows_or_columns_are_a_difference() -> None:
    assert table_differences(OLD, OLD.assign(encoder=["sam", "sam2"]), KEYS)[0].startswith("2 rows are in one run only")
    assert "columns encoder, top1" in table_differences(OLD, OLD[["encoder", "top1"]], KEYS)[0]


def test_folders_are_compared_table_by_table(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    table = pd.DataFrame(
        {"oracle": ["a", "b"], "iou_type": "segm", "AP": [40.0, 60.0], "low": [38.0, 58.0], "high": [42.0, 62.0]}
    )
    for folder in (old, new):
        folder.mkdir()
        table.to_csv(folder / "03_oracles.csv", index=False)
    assert differences(old, new) == []
    table.assign(AP=[40.0, 70.0]).to_csv(new / "03_oracles.csv", index=False)
    assert differences(old, new) == ["03_oracles: ('b', 'segm'): AP is 70, expected 56 to 64"]
    (new / "03_oracles.csv").unlink()
    assert differences(old, new) == [f"{new / '03_oracles.csv'} is missing"]


def test_another_verdict_is_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = tmp_path / "old", tmp_path / "new"
    for folder, verdict, measured in zip(folders, ("partly", "not supported"), (0.1, 99.0), strict=True):
        folder.mkdir()
        table = pd.DataFrame({"claim": ["C1", "C3"], "verdict": ["supported", verdict], "measured": measured})
        table.to_csv(folder / "04_findings.csv", index=False)
        OLD.to_csv(folder / "same.csv", index=False)
    assert agree(folders[0], folders[0])
    assert not agree(*folders)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "04_findings: C3: the verdict is 'not supported', expected 'partly'",
        "1 of 2 tables are equal byte for byte",
    ]
