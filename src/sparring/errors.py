"""Errors a user can cause, told in one line; the command line turns each into its exit code."""

from __future__ import annotations

import errno


class SparringError(Exception):
    """Something went wrong that one clear line can explain; the program exits with 1."""

    exit_code = 1


class InputError(SparringError):
    """Bad input: the message says what, where (file:line) and how to mend it; the program exits with 2."""

    exit_code = 2


class BusyError(InputError):
    """Another process holds the run's lock."""


class NonFiniteError(SparringError):
    """A loss or gradient is not finite: the step was not taken and the batch was kept for inspection."""


class Interrupted(SparringError):
    """Ctrl-C or SIGTERM; the message says how to continue."""

    exit_code = 130


def told(error: Exception) -> tuple[str, int] | None:
    """Message and exit code for what a user can mend; None for a fault of the program, which keeps its traceback."""
    if isinstance(error, SparringError):
        return str(error), error.exit_code
    # typer carries its own copy of click, whose usage errors are told by their attributes
    if hasattr(error, "format_message"):
        return " ".join(error.format_message().split()), 2
    # torch's class, which is known by name: this module is imported where torch is not
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "out of GPU memory; lower train.micro_tokens or play.batch_size (neither changes results) and try again",
            1,
        )
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    # safetensors tells of a full disk in its text alone
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"(os error {errno.ENOSPC})" in str(error):
        return f"{where}no space left on the disk; free some and give the same command again: nothing is lost", 2
    return (f"{where}{error.strerror}; give another path", 2) if isinstance(error, OSError) and where else None
