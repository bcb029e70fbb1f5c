"""The two errors that are meant for a reader; every other exception is a defect and keeps its traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong input: config, file, layout or environment.

    The text says `where: what is wrong with which value; what is allowed; what to do`. The command line prints it
    without a traceback and exits with status 2.
    """


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that its text says in full: it diverged, or another start took it over.

    The command line prints it without a traceback and exits with status 1.
    """
