"""How much faster proposals are than SAM's own automatic mask generator: same weights, settings, photograph and cores.

    python tests/bench/bench_proposals.py [PHOTOGRAPH] [--points 32] [--threads 2]     # default: a made picture

The official ViT-B architecture at random weights. Its masks are noise, which is dear to encode: so the thresholds are
set, from a coarse grid, to let half of the masks pass by predicted IoU and one in fifty of those by stability as well.
That leaves the package little of the encoding on which it loses most; with real weights more masks pass.
Each side runs in its own process, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any
from unittest import mock

import numpy as np
import torch
from measuring import forget_peak, made_photo, peak_gib, timed
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything.modeling import Sam

from samantics.training_free.decoder import encode_image
from samantics.training_free.proposals import ProposalSettings, propose_encoded

SIDES = ("ours", "package")
OFFSET = 0.02  # logits of random weights are of the order of 0.1


def random_vit_b() -> Sam:
    torch.manual_seed(0)
    return sam_model_registry["vit_b"]().eval()


def thresholds(photo: Image.Image) -> tuple[float, float]:
    """Predicted IoU that half of the masks exceed, and stability that one in fifty of those reaches."""
    everything = ProposalSettings(
        points_per_side=6, predicted_iou=0.0, stability=0.0, stability_offset=OFFSET, box_nms=1.0
    )
    found = propose_encoded(encode_image(random_vit_b(), photo), everything)
    predicted_iou = float(np.median(found.predicted_iou))
    return predicted_iou, float(np.quantile(found.stability[found.predicted_iou > predicted_iou], 0.98))


def measured(side: str, photo: Image.Image, settings: ProposalSettings) -> dict[str, Any]:
    """Seconds (wall and processor) to encode and to do all, peak memory (GiB) over the model's own, masks found."""
    model, encode, found = random_vit_b(), [], []
    forget_peak()
    before = peak_gib()

    def ours() -> None:
        images: list[Any] = []
        encode.append(timed(lambda: images.append(encode_image(model, photo))))
        found.extend(propose_encoded(images[0], settings).rles)

    def package() -> None:
        with mock.patch.object(SamPredictor, "set_image", set_image):
            found.extend(generator(model, settings).generate(np.asarray(photo)))

    def set_image(predictor: SamPredictor, *arguments: Any) -> None:
        encode.append(timed(package_set_image, predictor, *arguments))

    package_set_image = SamPredictor.set_image
    whole = timed(ours if side == "ours" else package)
    memory = peak_gib() - before
    return {"side": side, "encode": encode[0], "whole": whole, "peak_gib": memory, "masks": len(found)}


def generator(model: Sam, settings: ProposalSettings) -> SamAutomaticMaskGenerator:
    return SamAutomaticMaskGenerator(
        model,
        points_per_side=settings.points_per_side,
        pred_iou_thresh=settings.predicted_iou,
        stability_score_thresh=settings.stability,
        stability_score_offset=settings.stability_offset,
        box_nms_thresh=settings.box_nms,
        output_mode="coco_rle",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photograph", nargs="?")
    parser.add_argument("--points", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help="internal: measure one side in this process")
    parser.add_argument("--thresholds", type=float, nargs=2, help="internal")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    photo = Image.open(options.photograph).convert("RGB") if options.photograph else made_photo()
    if options.side:
        settings = ProposalSettings(options.points, *options.thresholds, OFFSET, box_nms=1.0)
        print(json.dumps(measured(options.side, photo, settings)))
        return 0
    limits = thresholds(photo)
    report(*(one_side(side, options.photograph, options.points, options.threads, limits) for side in SIDES))
    return 0


def one_side(
    side: str, photograph: str | None, points: int, threads: int, limits: tuple[float, float]
) -> dict[str, Any]:
    """:func:`measured`, in a process of its own."""
    command = [sys.executable, __file__, *([photograph] if photograph else [])]
    command += ["--points", str(points), "--threads", str(threads), "--side", side]
    command += ["--thresholds", *map(str, limits)]
    row: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return row


def report(ours: dict[str, Any], package: dict[str, Any]) -> None:
    print(f"{'':8} {'encode s':>9} {'all s':>8} {'encode cpu s':>13} {'all cpu s':>10} {'peak GiB':>9} {'masks':>6}")
    for row in (ours, package):
        (encode, encode_cpu), (whole, whole_cpu) = row["encode"], row["whole"]
        print(
            f"{row['side']:8} {encode:9.1f} {whole:8.1f} {encode_cpu:13.1f} {whole_cpu:10.1f}"
            f" {row['peak_gib']:9.2f} {row['masks']:6d}"
        )
    for name, clock in (("wall", 0), ("processor", 1)):
        everything = package["whole"][clock] / ours["whole"][clock]
        decode = (package["whole"][clock] - package["encode"][clock]) / (ours["whole"][clock] - ours["encode"][clock])
        print(f"{name} time: {everything:.1f} times faster with encoding, {decode:.1f} without")


if __name__ == "__main__":
    raise SystemExit(main())
