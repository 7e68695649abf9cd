"""Settings of the three scales. The same notebooks run at each; only these values differ.

One nested dataclass per notebook. A setting that is the same at every scale has a default; a scale names the others.
"""

from __future__ import annotations

import dataclasses

from samantics.errors import StudyError


@dataclasses.dataclass(frozen=True)
class ProbingSettings:
    """Notebook 01.

    Attributes:
        probe_seeds: probes trained for each row, with seeds 0, 1, ...
    """

    probe_seeds: int = 3


@dataclasses.dataclass(frozen=True)
class InContextSettings:
    """Notebook 02.

    Attributes:
        shots: references per class at which AP is reported.
        reference_seeds: draws of the references, with seeds 0, 1, ...
    """

    shots: tuple[int, ...] = (1, 5, 10)
    reference_seeds: int = 3


@dataclasses.dataclass(frozen=True)
class PipelineSettings:
    """Notebook 03.

    Attributes:
        shots: references per class of the headline row.
        reference_seeds: draws of the references, with seeds 0, 1, ...
    """

    shots: int = 10
    reference_seeds: int = 3


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a run is made of.

    Attributes:
        name: ``pocket``, ``lite`` or ``paper``.
        weights: where encoders come from: ``zoo`` (shipped with the project) or ``official`` (downloaded, verified).
        encoders: names of the encoders compared, in the order of tables and figures.
        probing, incontext, pipeline: settings of notebooks 01, 02 and 03.
    """

    name: str
    weights: str
    encoders: tuple[str, ...] = ("sam", "sam2", "clip", "dinov2", "random")
    probing: ProbingSettings = ProbingSettings()
    incontext: InContextSettings = InContextSettings()
    pipeline: PipelineSettings = PipelineSettings()


SCALES = {
    scale.name: scale
    for scale in (
        Scale(name="pocket", weights="zoo"),
        Scale(name="lite", weights="official"),
        Scale(name="paper", weights="official"),
    )
}


def get_scale(name: str) -> Scale:
    """The settings of that name.

    Raises:
        StudyError: no such scale.
    """
    if name not in SCALES:
        raise StudyError(f"no scale is called {name!r}: choose from {', '.join(SCALES)}")
    return SCALES[name]
