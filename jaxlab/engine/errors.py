"""Errors of a run, each with its exit code; the command line prints the message alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input by the user; the command line prints the message alone and exits with 2."""


class SaveError(RuntimeError):
    """A checkpoint that the run depends on could not be saved; exit code 1."""


class BadNumbersError(RuntimeError):
    """Too many steps in a row were not finite; exit code 76."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the nearest choice, or nothing."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
