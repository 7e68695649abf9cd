"""The one error type that users meet: a line that says what happened, to which file, and what to do."""

from __future__ import annotations


class StudyError(Exception):
    """A fault that the user can mend. Its message is one line: what happened, to which file, what to do."""
