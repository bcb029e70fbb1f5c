"""The one error type for mistakes that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong input: config, file, layout or environment.

    The text says `where: what is wrong with which value; what is allowed; what to do`. The command line prints it
    without a traceback and exits with status 2; every other exception is a defect and keeps its traceback.
    """
