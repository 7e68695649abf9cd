"""How far encoding is from what the machine can do, and what the paper's scale would cost.

    python tests/bench/bench_roofline.py [--quick]      # prints the table that speed.py draws

A model's arithmetic (FLOPs) is counted, not estimated; the machine's peak is the best of some large matrix products in
this process. Hours on a GPU are an ESTIMATE: counted arithmetic over the published peak at an assumed utilisation.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from bench_probing import IMAGENET
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring import made_photo, timed
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from samantics import plots as figures
from samantics.models.encoder import Encoder, load_encoder

STUDY = ("sam", "sam2", "clip", "dinov2")
OTHERS = ("mae", "hiera", "sam3", "dinov3", "siglip2")  # official only
PAPER_IMAGES = IMAGENET + 50_000  # train and validation
PEAKS = {  # published dense TFLOP/s
    ("A100", "bf16"): 312.0,
    ("A100", "tf32"): 156.0,
    ("H100", "bf16"): 989.0,
    ("H100", "tf32"): 494.0,
}
UTILISATION = (0.30, 0.35, 0.40)  # assumed: low, middle, high
READERS = 16  # cores that decode images beside a GPU
COUNTED_ONLY = ("sam3",)  # minutes for an image on two cores
MEASURED = Path(__file__).parents[2] / "figures" / "bench" / "gpu.csv"  # what `bench_probing.py gpu` gave on an H100
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peak_gflops(kind: str, side: int = 4096, tries: int = 5) -> float:
    """The best of some products of two square matrices, GFLOP/s."""
    first, second = (torch.randn(side, side).to(TYPES[kind]) for _ in range(2))
    return max(2 * side**3 / timed(torch.mm, first, second)[0] for _ in range(tries)) / 1e9


def gflop(encoder: Encoder) -> float:
    """Arithmetic of one image, billions of additions and multiplications: matrix products and convolutions.

    Counted on shapes alone: the model's weights are gone afterwards.
    """
    pixels = torch.zeros(1, 3, encoder.image_size, encoder.image_size, device="meta")
    model = encoder.model.to("meta")
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention would not be counted
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            encoder.architecture.forward(model, pixels)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 1e9


def rates(encoder: Encoder, seconds: float) -> list[float]:
    """Images per second of some batches, one after another, for about that long and at least twice."""
    side, found = encoder.image_size, []
    pixels = torch.randn(1 if side > 512 else 16, 3, side, side)
    if side <= 512:
        encoder.pooled(pixels[:1], [encoder.headline])  # what is set up once
    started = time.perf_counter()
    while len(found) < 2 or (time.perf_counter() - started < seconds and len(found) < 20):
        found.append(len(pixels) / timed(encoder.pooled, pixels, [encoder.headline])[0])
    return found


def reading_rate(encoder: Encoder, seconds: float = 0.5) -> float:
    """JPEG files of ImageNet's usual 500 x 375 pixels, decoded and made an input, per second and core."""
    file = io.BytesIO()
    made_photo(500, 375).save(file, "JPEG", quality=95)
    count, busy = 0, 0.0
    while busy < seconds:
        busy += timed(lambda: encoder.preprocess(Image.open(file).convert("RGB")))[1]
        count += 1
    return count / busy


def measure(quick: bool) -> pd.DataFrame:
    """One row for each encoder and, where both are measured, number format."""
    peaks = {kind: peak_gflops(kind, 1024 if quick else 4096) for kind in TYPES}
    return pd.DataFrame(list(_rows(peaks, quick)))


def _rows(peaks: dict[str, float], quick: bool) -> Iterator[dict[str, Any]]:
    chosen = [("pocket", name) for name in STUDY] + [("official", name) for name in STUDY]
    chosen = chosen[:1] + chosen[6:7] if quick else chosen + [("official", name) for name in OTHERS]
    for size, name in chosen:
        encoder = load_encoder(name, "zoo" if size == "pocket" else "random")
        found = {kind: np.full(1, np.nan) for kind in TYPES}
        if name not in COUNTED_ONLY:
            for kind in TYPES:
                timing = dataclasses.replace(encoder, half=kind == "bf16")
                found[kind] = np.array(rates(timing, 0.5 if quick else 3))
        work = gflop(encoder)
        hours = estimates(work, reading_rate(encoder)) if size == "official" else {}
        for kind, per_second in found.items():
            share = 100 * per_second * work / peaks[kind]
            yield {
                "size": size,
                "encoder": name,
                "numbers": kind,
                "input_pixels": encoder.image_size,
                "gflop_per_image": work,
                "images_per_s": float(np.median(per_second)),
                "machine_peak_gflops": peaks[kind],
                "percent_of_peak": float(np.median(share)),
                "percent_low": float(share.min()),
                "percent_high": float(share.max()),
                **(hours if kind == "fp32" else {}),
            }


def estimates(work: float, read: float) -> dict[str, float]:
    """Hours for ImageNet-1k, each image once, by GPU and number format; and to read the images with some cores."""
    hours = {
        f"estimate_hours_{gpu.lower()}_{kind}": PAPER_IMAGES * work / (1000 * peak * UTILISATION[1]) / 3600
        for (gpu, kind), peak in PEAKS.items()
    }
    reading = PAPER_IMAGES / (read * READERS) / 3600
    return hours | {f"estimate_hours_reading_{READERS}_cores": reading, "assumed_utilisation": UTILISATION[1]}


# ------------------------------------------------------------------------------------------------------ the figure


def roofline_figure(table: pd.DataFrame) -> Figure:
    """Left: share of the machine's peak that each encoder reaches. Right: estimated hours for ImageNet-1k."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.6), width_ratios=(1, 1.1))
    _reached(left, table[table["percent_of_peak"].notna()])
    _hours(right, table[table["assumed_utilisation"].notna()])
    spans = []
    for size in ("official", "pocket"):
        shares = table.loc[(table["size"] == size) & (table["numbers"] == "fp32"), "percent_of_peak"]
        spans.append(f"{size} encoders reach {shares.min():.0f} to {shares.max():.0f} % of")
    figures.headline(figure, f"{spans[0].capitalize()} this machine's float32 peak, {spans[1].removesuffix(' of')}")
    return figure


def _reached(axis: Axes, table: pd.DataFrame) -> None:
    names = list(dict.fromkeys(zip(table["size"], table["encoder"], strict=True)))
    for kind, shift, mark in (("fp32", -0.15, "o"), ("bf16", 0.15, "D")):
        rows = table[table["numbers"] == kind]
        for row in rows.to_dict("records"):
            place = names.index((row["size"], row["encoder"])) + shift
            spread = [[row["percent_of_peak"] - row["percent_low"]], [row["percent_high"] - row["percent_of_peak"]]]
            face = figures.COLOURS[row["encoder"]] if kind == "fp32" else "white"
            axis.errorbar(
                row["percent_of_peak"], place, xerr=spread, fmt=mark, color=figures.COLOURS[row["encoder"]],
                markerfacecolor=face, markersize=7,
            )  # fmt: skip
    for kind, mark, face in (("fp32", "o", "#444444"), ("bf16", "D", "white")):
        peak = table.loc[table["numbers"] == kind, "machine_peak_gflops"].iloc[0]
        label = f"{kind}, of {peak:,.0f} GFLOP/s"
        axis.plot([], [], mark, color="#444444", markerfacecolor=face, markersize=7, label=label)
    axis.set_yticks(range(len(names)), [f"{figures.LABELS[name]}, {size}" for size, name in names])
    axis.set(xlabel="share of the machine's own peak (%)", title="Measured on this machine", xlim=(0, None))
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=10)


def _hours(axis: Axes, table: pd.DataFrame) -> None:
    table = table.sort_values("gflop_per_image").reset_index(drop=True)
    kinds = ((("A100", "tf32"), "#D55E00", "s"), (("A100", "bf16"), "#E69F00", "D"),
             (("H100", "tf32"), "#0072B2", "o"), (("H100", "bf16"), "#56B4E9", "^"))  # fmt: skip
    for number, ((gpu, kind), colour, mark) in enumerate(kinds):
        hours = table[f"estimate_hours_{gpu.lower()}_{kind}"].to_numpy()
        place = np.arange(len(table)) + 0.16 * (number - 1.5)
        least, most = (hours * UTILISATION[1] / share for share in (UTILISATION[2], UTILISATION[0]))
        axis.errorbar(
            hours,
            place,
            xerr=[hours - least, most - hours],
            fmt=mark,
            color=colour,
            markersize=6,
            label=f"{gpu}, {kind}",
        )
    measured = pd.read_csv(MEASURED).set_index("encoder")["hours_bf16"].reindex(table["encoder"])
    label = "measured: H100, bf16, batches of 16"
    axis.plot(measured, np.arange(len(table)), "*", color="#222222", markersize=12, label=label)
    reading = table[f"estimate_hours_reading_{READERS}_cores"]
    axis.plot(reading, np.arange(len(table)), "|", color="#222222", markersize=26, markeredgewidth=2)
    axis.plot([], [], "|", color="#222222", markersize=12, markeredgewidth=2, label=f"reading, {READERS} cores")
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [tick for tick in (0.001, 0.01, 0.1, 1, 10, 100) if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks(range(len(table)), [figures.LABELS[name] for name in table["encoder"]])
    least, _, most = (f"{share:.0%}" for share in UTILISATION)
    axis.set(
        xlabel=f"hours, if {least} to {most} of the published peak is reached",
        title="ImageNet-1k, one GPU: ESTIMATED, stars measured",
    )
    axis.set_ylim(len(table) - 0.5, -0.5)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    print(measure(parser.parse_args().quick).to_string(index=False))


if __name__ == "__main__":
    main()
