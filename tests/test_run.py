from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from samantics import plots
from samantics.errors import StudyError
from samantics.run import PIXELS_WIDE, Run, available_cores, start_run

TABLE = pd.DataFrame({"encoder": ["sam", "clip"], "top1": [11.06, 73.92], "third": [1 / 3, np.float32(0.1)]})


def test_a_result_is_a_picture_its_numbers_and_their_origin(pocket_run: Run) -> None:
    plots.style()
    figure, axes = plt.subplots()
    axes.bar(TABLE["encoder"], TABLE["top1"])
    pocket_run.record("weights", {"sam": "abc"})
    pocket_run.save(figure, TABLE, "99_bars", "Bars of accuracy.")
    plt.close(figure)
    path = pocket_run.figures / "99_bars.png"
    with Image.open(path) as picture:
        assert picture.width == PIXELS_WIDE
    pd.testing.assert_frame_equal(pd.read_csv(path.with_suffix(".csv")), TABLE, rtol=1e-5)
    origin = json.loads(path.with_suffix(".json").read_text())
    assert origin["caption"] == "Bars of accuracy." and origin["recorded"] == {"weights": {"sam": "abc"}}
    assert (origin["scale"], origin["seed"], origin["notebook"]) == ("pocket", 3, "99_test")
    assert origin["packages"]["segment-anything"] == "1.0" and origin["machine"]["cores"] == 1


def test_a_table_alone_leaves_no_picture_and_a_rerun_equal_bytes(pocket_run: Run) -> None:
    path = pocket_run.figures / "99_table.csv"
    pocket_run.save(None, TABLE, "99_table")
    first = path.read_bytes()
    pocket_run.save(None, TABLE, "99_table")
    assert path.read_bytes() == first and not path.with_suffix(".png").exists()


def test_a_quick_run_marks_every_figure_and_record(places: Path) -> None:
    run, figure = start_run("quick", "99_test"), plt.figure()
    run.save(figure, TABLE, "99_bars")
    (mark,) = [text.get_text() for text in figure.texts]
    assert mark == json.loads((run.figures / "99_bars.json").read_text())["mark"] and "quick run" in mark
    assert run.figures.name == "quick" and not start_run("pocket").scale.mark
    plt.close(figure)


def test_recording_two_values_under_one_name_is_refused(pocket_run: Run) -> None:
    pocket_run.record("data", "abc")
    pocket_run.record("data", "abc")
    with pytest.raises(StudyError, match="recorded 'data' as 'abc' and now as 'def'"):
        pocket_run.record("data", "def")


def test_cores_follow_the_thread_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert available_cores() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "not a number")
    assert available_cores() >= 1


def test_every_name_that_a_reader_imports_is_there_and_importing_loads_no_model_package() -> None:
    import samantics

    assert all(getattr(samantics, name) is not None for name in samantics.__all__)
    with pytest.raises(AttributeError, match="samantics has no 'sam'"):
        _ = samantics.sam
    code = "import samantics.cli, sys; samantics.cli.main(['run', '--help']); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "False"
