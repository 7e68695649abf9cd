"""What a run at the scales `lite` and `paper` needs: told before it starts, and fetched before its first notebook."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd

from samantics.cache import cache_dir
from samantics.data.classification import scale_data
from samantics.data.detection import load_data
from samantics.errors import StudyError
from samantics.models.encoder import within_reach
from samantics.models.registry import ENCODERS
from samantics.models.weights import weight_file
from samantics.run import start_run
from samantics.scales import Scale, get_scale

COCO_IMAGE = 0.163  # MB, the mean of val2017
CLASSIFIED = {"lite": ("Imagenette, 320 pixels", 342, 690), "paper": ("ImageNet-1k, yours (--data)", 0, 0)}  # MB
COMPUTED = {"lite": 10_000, "paper": 300_000}  # MB of features and results
HOURS = {  # ESTIMATED (docs/speed.md): on one H100, on two processor cores; without SAM 3
    "lite": {"01": (1, 35), "02": (3, 200), "03": (1, 12), "04": (0.1, 0.1)},
    "paper": {"01": (20, 3000), "02": (120, 20_000), "03": (10, 120), "04": (0.1, 0.1)},
}
IMAGENET = "--data DIR (ImageNet-1k: train/ and val/ inside)"
COCO = "--references FILE --targets FILE --images DIR (COCO 2017)"


def prepare(name: str, notebooks: Collection[str], given: Mapping[str, Any]) -> None:
    """Print the plan of a run, then fetch what it needs; a scale that needs nothing prints nothing.

    Raises:
        StudyError: `paper` without the user's folders; something cannot be fetched or used.
    """
    scale = get_scale(name)
    if scale.weights != "official":
        return
    wanted = {"01": scale.encoders, "02": ("sam",), "03": scale.pipeline.sources}
    known = dict.fromkeys(name for number in notebooks for name in wanted.get(number, ()) if name != "random")
    official = tuple(known) if given.get("weights", "official") == "official" else ()
    names = within_reach(official, "official")
    print(f"scale {name} fetches what is not there yet (into {cache_dir()}) and computes the rest:")
    print(needs(scale, notebooks, given, names).to_string(index=False), end="\n\n")
    for gated in [encoder for encoder in official if encoder not in names]:
        print(f"without {gated}: {ENCODERS[gated].weights.gate}")
    rows = [(number, *HOURS[name][number]) for number in notebooks if number in HOURS[name]]
    hours = pd.DataFrame(rows, columns=["notebook", "hours on one H100 (estimated)", "on two cores (estimated)"])
    print(hours.to_string(index=False, float_format="{:g}".format), end="\n\n", flush=True)
    instances = bool({"02", "03"} & set(notebooks))
    options = {"data": IMAGENET} if "01" in notebooks else {}
    options |= {"references": COCO} if instances else {}
    lacking = [words for option, words in options.items() if option not in given]
    if name == "paper" and lacking:
        raise StudyError(f"scale paper needs {' and '.join(lacking)}: name them, or choose --scale lite")
    for encoder in names:
        weight_file(ENCODERS[encoder].weights)
    run = start_run(name)
    if "01" in notebooks:
        scale_data(run, given.get("data", ""))
    if instances:
        load_data(run, **{key: given.get(key, "") for key in ("references", "targets", "images")})


def needs(scale: Scale, notebooks: Collection[str], given: Mapping[str, Any], names: Collection[str]) -> pd.DataFrame:
    """A row for each thing: megabytes to be fetched when nothing is there, and on disk afterwards."""
    files = [ENCODERS[name].weights for name in names]
    rows = [(f"weights of {name}", file.size, file.size) for name, file in zip(names, files, strict=True)]
    if "01" in notebooks and "data" not in given:
        rows.append(CLASSIFIED[scale.name])
    if {"02", "03"} & set(notebooks) and "references" not in given:
        if scale.coco:
            images = round((scale.coco.targets + 1000) * COCO_IMAGE)
            rows += [("COCO val2017, annotations", 253, 30), ("COCO val2017, about 1,500 images", images, images)]
        else:
            rows.append(("COCO 2017, yours (--references, ...)", 0, 0))
    rows.append(("features and results (estimated)", 0, COMPUTED[scale.name]))
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return pd.DataFrame(rows, columns=["what", "MB to fetch", "MB on disk"])
