from __future__ import annotations

import pytest

from samantics.errors import StudyError
from samantics.scales import SCALES, get_scale


def test_scales_have_the_name_they_are_found_by() -> None:
    assert [get_scale(name).name for name in ("pocket", "quick", "lite", "paper")] == list(SCALES)


def test_unknown_scale_names_the_known_ones() -> None:
    with pytest.raises(StudyError, match="'poket': choose from pocket, quick, lite, paper"):
        get_scale("poket")
