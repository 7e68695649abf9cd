"""What the benchmarks share: clocks, peak memory, something to work on, and where their results go."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from samantics.cache import hash_value
from samantics.data import first_world
from samantics.run import Run, figures_dir, start_run

IMAGENET = 1_281_167  # train images


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Wall and processor seconds: on a busy machine the second says more."""
    start, begun = time.perf_counter(), time.process_time()
    work(*arguments)
    return time.perf_counter() - start, time.process_time() - begun


def peak_gib(process: int | str = "self") -> float:
    """Highest memory of this process (or another's) so far (getrusage would start from its parent's)."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def forget_peak() -> None:
    """From now on the peak is that of what follows: inputs are often made with more memory than they take."""
    Path("/proc/self/clear_refs").write_text("5")


def made_photo(width: int = 640, height: int = 480) -> Image.Image:
    """A picture of a photograph's size, the same everywhere: a MojiWorld scene, its edges cut off."""
    scene = Image.fromarray(first_world.scene(first_world.World(image_size=max(width, height)), "bench", 0).image)
    left, top = (scene.width - width) // 2, (scene.height - height) // 2
    return scene.crop((left, top, left + width, top + height))


def pictures(count: int) -> tuple[np.ndarray, np.ndarray, int]:
    """``count`` of MojiWorld's classification pictures, their categories, and where validation begins."""
    drawings = len(first_world.catalogue())
    views = -(-count // drawings)
    chosen = np.random.default_rng(0).permutation(views * drawings)[:count]
    world = first_world.World()
    found = first_world.render(lambda index: first_world.classification_picture(world, views, index), chosen.tolist())
    return found.images, first_world.category_of_drawing()[chosen // views], count * 4 // 5


def bench_run(name: str, quick: bool) -> Run:
    """The run that signs a benchmark's files in ``figures/bench``; a rehearsal's stay in the cache."""
    run = start_run("pocket", f"tests/bench/{name}.py")
    run = dataclasses.replace(run, figures=(run.cache.parent if quick else figures_dir()) / "bench")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    run.record("processor", next((line.partition(":")[2].strip() for line in lines if "model name" in line), "unknown"))
    run.record("threads", torch.get_num_threads())
    run.record("load_at_start", [round(value, 2) for value in os.getloadavg()])  # of other programs: 0 is quiet
    run.record("rehearsal", quick)
    run.record("photo", hash_value(made_photo().tobytes().hex()))
    return run
