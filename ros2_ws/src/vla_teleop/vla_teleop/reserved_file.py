"""ReservedFile: a file that can still be finished when the disk has become full.

Some megabytes are set aside in a second file beside it. The first write that finds no room gives them back
and goes on; `full` holds the error from then on, so that the writer above takes nothing new and completes its
file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

RESERVE_NAME = ".reserve"
RESERVE_BYTES = 8 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ReservedFile:
    """A new file, unbuffered and locked (flock) until closed; has the methods that mcap.Writer asks for.

    Raises:
        OSError: the file exists, or the reserve does not fit.
    """

    def __init__(self, path: Path, reserve_bytes: int = RESERVE_BYTES):
        self.full: OSError | None = None
        self._reserve = path.parent / RESERVE_NAME
        self._offset = 0
        with open(self._reserve, "wb") as reserve:
            try:
                os.posix_fallocate(reserve.fileno(), 0, reserve_bytes)
            except OSError as error:
                self.release()
                why = f"{reserve_bytes >> 20} MiB to finish a bag with: {error.strerror}"
                raise OSError(error.errno, why) from error
        self._file = open(path, "xb", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, data: bytes) -> int:
        """Write all of `data`; without room take the reserve, without that raise OSError."""
        view = memoryview(data)
        while view:
            try:
                done = self._file.write(view)
            except OSError as error:
                if error.errno not in _NO_ROOM or self.full is not None:
                    raise
                self.full = error
                self.release()
                continue
            self._offset += done
            view = view[done:]
        return len(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._offset

    def flush(self) -> None:
        """Nothing is buffered here."""

    def sync(self) -> None:
        """Bring everything written to the medium."""
        os.fdatasync(self._file.fileno())

    def release(self) -> None:
        """Give the reserve back to the disk."""
        with contextlib.suppress(FileNotFoundError):
            self._reserve.unlink()

    def close(self) -> None:
        """Close, unlock and give the reserve back."""
        self.release()
        self._file.close()


def is_locked(path: Path) -> bool:
    """Whether a live process still writes `path`."""
    with open(path, "rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
