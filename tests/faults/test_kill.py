"""``kill -9`` at any moment: the next run ends as an undisturbed one does and redoes one shard or interval at most."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import works
from PIL import Image
from processes import finish, hidden, is_running, kill_again_and_again, tell, told
from servers import Handler, serve

from notebooks import write_notebook
from samantics.cache import remove_leftovers
from samantics.models import pocket
from samantics.models.weights import WeightFile
from stub_encoder import MEAN

# set SAMANTICS_SLOW for other moments than those of the first seed
pytestmark = pytest.mark.parametrize("seed", range(1, 7) if "SAMANTICS_SLOW" in os.environ else [1])


def contents(folder: Path, *endings: str) -> dict[str, bytes]:
    """Every file with one of the endings, by its path in the folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in endings]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def kept(folder: Path, pattern: str) -> Callable[[], None]:
    """A check that a file once there is whole and stays as it is: same inode, so it was not written again."""
    seen: dict[Path, int] = {}

    def check() -> None:
        now = {path: path.stat().st_ino for path in folder.rglob(pattern)}
        assert {path: now.get(path) for path in seen} == seen
        seen.update(now)

    return check


def test_feature_extraction(seed: int, tmp_path: Path) -> None:
    undisturbed, log = works.encode(tmp_path / "whole"), tmp_path / "log"
    check = kept(tmp_path / "killed", "shard_*.json")
    killed = kill_again_and_again(
        works.encode, tmp_path / "killed", log, log=log, seed=seed, kills=8, units=9, seconds=0.05, check=check
    )
    assert killed == 8
    assert told(log) <= works.ROWS + killed * works.SHARD_ROWS
    assert contents(tmp_path / "killed", ".npy", ".json") == contents(tmp_path / "whole", ".npy", ".json")
    assert (works.encode(tmp_path / "killed").read(MEAN) == undisturbed.read(MEAN)).all()
    assert not hidden(tmp_path / "killed")


def test_proposals(seed: int, tmp_path: Path) -> None:
    dataset, log = works.scenes(tmp_path / "scenes"), tmp_path / "log"
    finish(works.propose, dataset, tmp_path / "whole", tmp_path / "other", log=tmp_path / "other")
    check = kept(tmp_path / "killed", "[0-9]*.json")
    killed = kill_again_and_again(
        works.propose,
        dataset,
        tmp_path / "killed",
        log,
        log=log,
        seed=seed,
        kills=5,
        units=2,
        seconds=0.05,
        check=check,
    )
    assert killed >= 3
    assert told(log) <= len(dataset.images) + killed
    files = contents(tmp_path / "killed", ".json")
    assert len(files) == len(dataset.images) and files == contents(tmp_path / "whole", ".json")
    assert not hidden(tmp_path / "killed")


def test_zoo_training(seed: int, tmp_path: Path) -> None:
    seen, log = works.pictures(), tmp_path / "log"
    finish(works.train_zoo, seen, tmp_path / "whole", tmp_path / "other", log=tmp_path / "other")
    assert told(tmp_path / "other") == works.RECIPE.steps

    def check() -> None:
        checkpoint = tmp_path / "killed" / "clip.ckpt"
        if checkpoint.exists():
            assert torch.load(checkpoint, weights_only=True)["step"] % works.RECIPE.checkpoint_every == 0

    killed = kill_again_and_again(
        works.train_zoo, seen, tmp_path / "killed", log, log=log, seed=seed, kills=4, units=3, check=check
    )
    assert killed >= 3
    assert told(log) <= works.RECIPE.steps + killed * works.RECIPE.checkpoint_every
    assert contents(tmp_path / "killed", ".safetensors") == contents(tmp_path / "whole", ".safetensors")
    curves = [pd.read_csv(tmp_path / run / "clip.csv").drop(columns="seconds") for run in ("killed", "whole")]
    pd.testing.assert_frame_equal(*curves)
    assert pocket.verify("clip", tmp_path / "killed")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        "clip.csv",
        "clip.json",
        "clip.safetensors",
    ]


def test_in_context_training(seed: int, tmp_path: Path) -> None:
    dataset, log = works.scenes(tmp_path / "scenes", 16), tmp_path / "log"
    steps = works.batch_sampler(dataset, tmp_path / "maps").steps
    arguments = (dataset, tmp_path / "maps")
    finish(works.train_in_context, *arguments, tmp_path / "whole.pt", tmp_path / "other", log=tmp_path / "other")
    path = tmp_path / "killed" / "model.pt"
    killed = kill_again_and_again(
        works.train_in_context, *arguments, path, log, log=log, seed=seed, kills=4, units=3, check=lambda: None
    )
    assert killed >= 3
    assert told(log) <= steps + killed * works.SAVE_EVERY
    whole, resumed = (torch.load(file, weights_only=True) for file in (tmp_path / "whole.pt", path))
    assert resumed["step"] == steps and resumed["curve"] == whole["curve"]
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]


def test_figures(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAMANTICS_FIGURES", str(tmp_path / "whole"))
    finish(works.draw, tmp_path / "other", log=tmp_path / "other")
    monkeypatch.setenv("SAMANTICS_FIGURES", str(tmp_path / "killed"))
    whole, folder, log = contents(tmp_path / "whole", ".png", ".csv"), tmp_path / "killed", tmp_path / "log"

    def check() -> None:
        for path in folder.glob("*/[0-9]*"):
            if path.suffix == ".json":
                assert json.loads(path.read_text())["caption"] == "Lines."
            else:
                assert path.read_bytes() == whole[str(path.relative_to(folder))]

    killed = kill_again_and_again(works.draw, log, log=log, seed=seed, kills=4, check=check)
    assert killed >= 3
    assert len(hidden(folder)) <= killed  # until the study's next run, which begins with this:
    remove_leftovers(folder, "**/.*")
    assert not hidden(folder)
    assert contents(folder, ".png", ".csv") == whole and len(contents(folder, ".json")) == works.FIGURES
    for path in folder.rglob("*.png"):
        Image.open(path).verify()


CELL = """\
import os, time
from pathlib import Path
with open({log!r}, "ab") as file:
    file.write(b".")
Path({log!r} + ".pid").write_text(str(os.getpid()))
time.sleep(0.1)
print({number})"""


def test_papermill(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    for name in ("00_first", "01_second"):
        cells = [CELL.format(log=str(log), number=number) for number in range(4)]
        write_notebook(tmp_path / "notebooks", name, *cells)

    def use(name: str) -> Path:
        monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / name / "cache"))
        monkeypatch.setenv("SAMANTICS_FIGURES", str(tmp_path / name / "figures"))
        return tmp_path / name

    whole = use("whole")
    finish(works.run_notebooks, tmp_path / "notebooks", log=log)
    killed = use("killed")

    def check() -> None:
        over = time.monotonic() + 20
        while is_running(int((tmp_path / "log.pid").read_text())):  # no kernel goes on alone
            assert time.monotonic() < over
            time.sleep(0.05)
        for path in killed.glob("figures/pocket/notebooks/[0-9]*.ipynb"):
            assert nbformat.read(path, as_version=4).cells[-1].outputs

    arguments = (works.run_notebooks, tmp_path / "notebooks")
    assert kill_again_and_again(*arguments, log=log, seed=seed, kills=2, units=8, files=2, check=check) == 2
    executed, place = contents(whole / "figures", ".ipynb", ".html"), "pocket/index.html"  # with the seconds in it
    assert {**contents(killed / "figures", ".ipynb", ".html"), place: b""} == {**executed, place: b""}
    assert pd.read_csv(killed / "figures" / "pocket" / "run.csv")["notebook"].tolist() == ["00_first", "01_second"]
    assert not hidden(killed / "figures")


def test_download(seed: int, tmp_path: Path) -> None:
    content, log = hashlib.shake_256(b"weights").digest(1_000_000), tmp_path / "log"

    def slowly(request: Handler, content: bytes, start: int) -> None:
        request.head(206 if start < len(content) else 416, len(content) - start)
        for place in range(start, len(content), works.PIECE):
            request.wfile.write(content[place : place + works.PIECE])
            tell(log)
            time.sleep(0.002)

    place = tmp_path / "weights" / "file.bin"
    place.parent.mkdir()
    with serve(content, *[slowly] * 9) as server:
        known = WeightFile("file.bin", server.url, hashlib.sha256(content).hexdigest(), 1, "none")
        killed = kill_again_and_again(
            works.fetch, known, place, log=log, seed=seed, kills=3, units=9, files=1, check=lambda: None
        )
    assert killed >= 2
    assert server.starts[0] == 0 and all(server.starts[1:])  # what had come was not fetched again
    assert place.read_bytes() == content and [path.name for path in place.parent.iterdir()] == ["file.bin"]
