"""What all tests share: a drawing backend without a screen, one thread, and folders of their own."""

from pathlib import Path

import matplotlib as mpl
import pytest
import torch

from samantics.run import Run, start_run

mpl.use("agg")
torch.set_num_threads(1)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own folder, in which figures and caches are."""
    monkeypatch.setenv("SAMANTICS_FIGURES", f"{tmp_path}/figures")
    monkeypatch.setenv("SAMANTICS_CACHE", f"{tmp_path}/cache")
    return tmp_path


@pytest.fixture
def pocket_run(places: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A pocket run whose figures and caches are in the test's own folder."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return start_run("pocket", "99_test", seed=3)
