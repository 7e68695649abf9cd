"""What all tests share: a drawing backend without a screen, and one thread, as tests run side by side."""

from __future__ import annotations

import matplotlib as mpl
import pytest
import torch

from samantics.run import Run, start_run

mpl.use("agg")
torch.set_num_threads(1)


@pytest.fixture
def pocket_run(tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A pocket run whose figures and caches are in the test's own folder."""
    monkeypatch.setenv("SAMANTICS_FIGURES", f"{tmp_path}/figures")
    monkeypatch.setenv("SAMANTICS_CACHE", f"{tmp_path}/cache")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return start_run("pocket", "99_test", seed=3)
