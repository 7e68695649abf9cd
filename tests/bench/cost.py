"""How far encoding is from what the machine can do, and what the paper's scale would cost.

    .venv/bin/python tests/bench/cost.py [--quick]     # a few minutes: roofline.csv and its figure in figures/bench
    .venv/bin/python tests/bench/cost.py --gpu         # images per second on a GPU: gpu.csv

A model's arithmetic (FLOPs) is counted, not estimated; the machine's peak is the best of some large matrix products in
this process. Hours on a GPU are an ESTIMATE: counted arithmetic over the published peak at an assumed utilisation.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from measuring import IMAGENET, bench_run, made_photo, timed
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from samantics import plots
from samantics.models.encoder import Encoder, load_encoder

STUDY = ("sam", "sam2", "clip", "dinov2")
OTHERS = ("mae", "hiera", "sam3", "dinov3", "siglip2")  # official only; SAM 3 takes minutes for an image: only counted
IMAGES = IMAGENET + 50_000  # train and validation
PEAKS = {"a100_bf16": 312.0, "a100_tf32": 156.0, "h100_bf16": 989.0, "h100_tf32": 494.0}  # published dense TFLOP/s
UTILISATION = 0.35  # assumed
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peak_gflops(kind: str, side: int) -> float:
    """The best of some products of two square matrices, GFLOP/s."""
    first, second = (torch.randn(side, side).to(TYPES[kind]) for _ in range(2))
    return max(2 * side**3 / timed(torch.mm, first, second)[0] for _ in range(5)) / 1e9


def gflop(encoder: Encoder) -> float:
    """Arithmetic of one image, counted on shapes alone: the model's weights are gone afterwards."""
    pixels = torch.zeros(1, 3, encoder.image_size, encoder.image_size, device="meta")
    model, fast = encoder.model.to("meta"), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention would not be counted
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder.architecture.forward(model, pixels)
    torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 1e9


def rates(encoder: Encoder, seconds: float) -> np.ndarray:
    """Images per second of some batches, one after another, for about that long and at least twice."""
    pixels = torch.randn(1 if encoder.image_size > 512 else 16, 3, encoder.image_size, encoder.image_size)
    encoder.pooled(pixels[:1], [encoder.headline])  # what is set up once
    started, found = time.perf_counter(), []
    while len(found) < 2 or (time.perf_counter() - started < seconds and len(found) < 20):
        found.append(len(pixels) / timed(encoder.pooled, pixels, [encoder.headline])[0])
    return np.array(found)


def reading_rate(encoder: Encoder) -> float:
    """JPEG files of ImageNet's usual 500 x 375 pixels, decoded and made an input, per second and core."""
    file = io.BytesIO()
    made_photo(500, 375).save(file, "JPEG", quality=95)
    busy = [timed(lambda: encoder.preprocess(Image.open(file).convert("RGB")))[1] for _ in range(20)]
    return len(busy) / sum(busy)


def measured(quick: bool) -> Iterator[dict[str, Any]]:
    """One row for each encoder and number format."""
    peaks = {kind: peak_gflops(kind, 1024 if quick else 4096) for kind in TYPES}
    chosen = [("pocket", name) for name in STUDY] + [("official", name) for name in STUDY + OTHERS]
    for size, name in [chosen[0], chosen[6]] if quick else chosen:
        encoder = load_encoder(name, "zoo" if size == "pocket" else "random")
        halves = {kind: dataclasses.replace(encoder, half=kind == "bf16") for kind in TYPES}
        seconds = 0.5 if quick else 3
        found = {kind: np.full(1, np.nan) if name == "sam3" else rates(one, seconds) for kind, one in halves.items()}
        read, work = reading_rate(encoder), gflop(encoder)
        hours = {f"estimate_hours_{k}": IMAGES * work / (1000 * p * UTILISATION) / 3600 for k, p in PEAKS.items()}
        hours |= {"estimate_hours_reading_16_cores": IMAGES / (16 * read) / 3600, "assumed_utilisation": UTILISATION}
        for kind, per_second in found.items():
            share = 100 * per_second * work / peaks[kind]
            row = {"size": size, "encoder": name, "numbers": kind, "input_pixels": encoder.image_size}
            row |= {"gflop_per_image": work, "images_per_s": np.median(per_second), "machine_peak_gflops": peaks[kind]}
            row |= {"percent_of_peak": np.median(share), "percent_low": share.min(), "percent_high": share.max()}
            yield row | (hours if (size, kind) == ("official", "fp32") else {})


def roofline_figure(table: pd.DataFrame) -> Any:
    """Share of the machine's peak that each encoder reaches, and estimated hours for ImageNet-1k."""
    left = table[table["percent_of_peak"].notna()].rename(columns={"percent_of_peak": "x"})
    left = left.assign(panel="share of this machine's peak (%), measured", what=left["numbers"])
    hours = [column for column in table if column.startswith("estimate_hours")]
    right = table.dropna(subset=hours).melt(["encoder", "size"], hours, "what", "x")
    right["what"] = right["what"].str.removeprefix("estimate_hours_").str.replace("_", " ")
    right = right.assign(
        panel="hours for ImageNet-1k, ESTIMATED (log)", percent_low=right["x"], percent_high=right["x"]
    )
    both = pd.concat([left, right])
    both["row"] = both["encoder"].map(plots.LABELS) + ", " + both["size"]
    figure = plots.dots(both, "x", "row", hue="what", panel="panel", low="percent_low", high="percent_high", xlabel=" ")
    figure.axes[1].set_xscale("log")
    figure.axes[1].xaxis.set_major_formatter("{x:g}")
    share = left.groupby("what")["x"].median()
    plots.headline(figure, f"The median encoder reaches {share['fp32']:.0f} % of the peak in float32")
    return figure


def on_gpu() -> pd.DataFrame:
    """Official sizes, untrained weights: bfloat16 in batches of 16 against the float32 loop in batches of 8."""

    def pool(encoder: Encoder, batch: int) -> torch.Tensor:
        parts = [encoder.pooled(part, [encoder.headline])[encoder.headline] for part in pixels.split(batch)]
        torch.cuda.synchronize()
        return torch.cat(parts)

    rows = []
    for name in STUDY:
        whole, half = (load_encoder(name, "random", "cuda", half=value) for value in (False, True))
        pixels = torch.randn(64, 3, whole.image_size, whole.image_size)
        cosine = float(torch.nn.functional.cosine_similarity(pool(whole, 8), pool(half, 16)).min())
        slow, fast = (64 / timed(pool, *side)[0] for side in ((whole, 8), (half, 16)))
        row = {"encoder": name, "images_per_s_fp32": slow, "images_per_s_bf16": fast, "ratio": fast / slow}
        row |= {"cosine": cosine, "hours_fp32": IMAGES / slow / 3600, "hours_bf16": IMAGES / fast / 3600}
        rows.append(row | {"device": torch.cuda.get_device_name(), "torch": torch.__version__})
    return pd.DataFrame(rows)


def main(
    quick: Annotated[bool, typer.Option("--quick")] = False, gpu: Annotated[bool, typer.Option("--gpu")] = False
) -> None:
    run = bench_run("cost", quick)
    plots.style()
    if gpu:
        run.save(None, on_gpu(), "gpu", "Images per second on a GPU.")
        return
    table = pd.DataFrame(list(measured(quick)))
    print(table.iloc[:, :10].to_string(index=False))
    caption = "Share of the machine's peak that each encoder reaches, and hours for ImageNet-1k on one GPU."
    run.save(roofline_figure(table), table, "roofline", caption)


if __name__ == "__main__":
    typer.run(main)
