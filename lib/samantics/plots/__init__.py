"""How results look: one palette, one style, and the primitives that every figure of the notebooks is drawn with."""

from __future__ import annotations

from samantics.plots.images import heat, image_grid, show_instances, tinted
from samantics.plots.style import COLOURS, CYCLE, LABELS, colours, headline, ink, label, style
from samantics.plots.tables import bars, dots, end_labels, heatmaps, lines, scatter, stacked

__all__ = [
    "COLOURS", "CYCLE", "LABELS", "bars", "colours", "dots", "end_labels", "headline", "heat", "heatmaps", "image_grid",
    "ink", "label", "lines", "scatter", "show_instances", "stacked", "style", "tinted",
]  # fmt: skip
