"""Which process works on what: locks of the operating system, which no death of a process can leave behind."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from llama_dist.errors import UserError

LOCKS = "LOCKS"  # the file
FOLDER = 0  # held while the plan is written, and while the results are merged
PRESENCE = 1  # held, shared, by each process that works in the folder
FIRST_UNIT = 2
TAKE, SHARE = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB
HELD = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Claims:
    """Claims of the units of work in a folder: byte `FIRST_UNIT + n` of one file is locked by whoever does unit n.

    POSIX record locks: local file systems, NFS, GPFS and Lustre (with -o flock) share them between nodes, and they
    are released when their process ends, however it ends. They belong to a process, so a process has one `Claims`
    of a folder. Where the file system has no locks `shared` turns False and everything can be had: what is written
    stays right, since every name is unique until it is renamed, but two processes may do the same unit.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; it must be a file that can be written to") from error
        self.shared = True

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def take(self, unit: int) -> bool:
        """Claim a unit; False where another process holds it."""
        return self._lock(TAKE, FIRST_UNIT + unit)

    def release(self, unit: int) -> None:
        self._lock(fcntl.LOCK_UN, FIRST_UNIT + unit)

    def is_free(self, unit: int) -> bool:
        """Whether no other process holds the unit; for a unit that this process does not hold."""
        return self.take(unit) and self._lock(fcntl.LOCK_UN, FIRST_UNIT + unit)

    def take_folder(self) -> bool:
        return self._lock(TAKE, FOLDER)

    def release_folder(self) -> None:
        self._lock(fcntl.LOCK_UN, FOLDER)

    def be_present(self) -> bool:
        """Say that this process works here; False where another is removing the folder."""
        return self._lock(SHARE, PRESENCE)

    def is_alone(self) -> bool:
        """Whether no other process works here; then none can begin to either, until this one is closed."""
        return self.shared and self._lock(TAKE, 0, length=0)

    def _lock(self, how: int, start: int, length: int = 1) -> bool:
        try:
            fcntl.lockf(self._handle, how, length, start)
        except OSError as error:
            if error.errno in NO_LOCKS:
                self.shared = False
            elif error.errno in HELD:
                return False
            else:
                raise
        return True
