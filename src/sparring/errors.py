"""Errors a user can cause, told in one line; the command line turns each into its exit code."""

from __future__ import annotations


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
