"""What every refusal is: one line of a length that can be read."""

from collections.abc import Callable
from typing import Any

import pytest

from samantics.errors import StudyError


def refused(says: str, call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The message with which a call is refused, in words that match the pattern."""
    with pytest.raises(StudyError, match=says) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    return message
