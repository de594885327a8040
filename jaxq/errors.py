"""The one error class for input that a user can mend."""

from __future__ import annotations

from typing import Any


class JaxqError(ValueError):
    """Bad input: the message is one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class at_path:
    """Puts the path of a leaf or an activation in front of an error about it."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, JaxqError):
            raise JaxqError(f"{self.path}: {error}") from None
