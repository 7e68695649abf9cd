from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from samantics.cache import Checkpoint, kept
from samantics.errors import StudyError

VALUES: dict[str, Any] = {
    ".csv": pd.DataFrame({"name": ["", "None", "a,b"], "ap": [1 / 3, np.nan, 2.0], "count": [1, 2, 3]}),
    ".json": [{"a": 1, "b": None}],
    ".npz": {"x": np.arange(3) / 7, "y": np.array([True])},
}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
        return True
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
    return bool(one == other)


@pytest.mark.parametrize("ending", VALUES)
def test_what_is_kept_comes_back_and_is_made_once(tmp_path: Path, ending: str) -> None:
    path, made = tmp_path / f"deep/value{ending}", []
    first = kept(path, lambda: made.append(1) or VALUES[ending])
    again = kept(path, lambda: made.append(1) or VALUES[ending])
    assert len(made) == 1 and _equal(first, VALUES[ending]) and _equal(again, VALUES[ending])
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no lock and nothing half-written stays"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        kept(tmp_path / "value.json", lambda: 1 / 0)
    assert not list(tmp_path.iterdir())


def _ask(path: Path) -> Any:
    import time

    def make() -> list[float]:
        with open(path.with_suffix(".log"), "a") as log:
            log.write("made\n")
        time.sleep(0.3)
        return [1.0]

    return kept(path, make)


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2) as pool:
        assert list(pool.map(_ask, [tmp_path / "value.json"] * 2)) == [[1.0], [1.0]]
    assert (tmp_path / "value.log").read_text() == "made\n"


def test_a_checkpoint_belongs_to_its_training(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state.pt", {"seed": 1})
    assert checkpoint.load() is None
    checkpoint.save({"step": 3, "weights": torch.ones(2)})
    state = checkpoint.load()
    assert state is not None and state["step"] == 3 and torch.equal(state["weights"], torch.ones(2))
    with pytest.raises(StudyError, match=r"another seed \(1, now 2\): delete it"):
        Checkpoint(checkpoint.path, {"seed": 2}).load()
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:20])
    with pytest.raises(StudyError, match="is damaged: delete it"):
        checkpoint.load()
