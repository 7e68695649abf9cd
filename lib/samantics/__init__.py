"""Does the Segment Anything Model know what it segments? What a reader imports, by the room it comes from.

A name is imported when it is first asked for: `import samantics` alone loads no model package.
"""

import importlib
from typing import Any

_ROOMS = {
    "data.coco": "CocoDataset mask_of read_image",
    "data.coco_files": "load_coco",
    "data.folders": "image_folders open_image",
    "data.references": "ReferenceRule choose_references",
    "incontext.model": "InContextModel",
    "incontext.separability": "knn_predictions linear_predictions tsne_map",
    "incontext.tokens": "box_masks mask_tokens sam_maps",
    "incontext.training": "train",
    "metrics.coco_ap": "ap_interval evaluate",
    "metrics.intervals": "Interval bootstrap_mean",
    "models.encoder": "Encoder load_encoder",
    "mojiworld.world": "STREAMS World picture",
    "probing.features": "encode_images",
    "probing.linear": "linear_probe paper_probe",
    "probing.probes": "knn_probe",
    "run": "Run start_run",
    "training_free.matching": "MemoryBank class_scores match remember unit",
    "training_free.proposals": "ProposalSettings point_grid propose",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"samantics has no {name!r}: it exports {', '.join(sorted(_HOME))}")
    return getattr(importlib.import_module(f"samantics.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
