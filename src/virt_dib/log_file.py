# SPDX-License-Identifier: Apache-2.0
"""The log of a build: one file, byte for byte what came, and of one build at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from virt_dib.errors import ToolError
from virt_dib.files import partial_name


class LogFile:
    """The log of one build. A log of that name is replaced once the new one is open.

    *on_elsewhere* is told of a file that only a killed build leaves.

    Raises:
        ToolError: it cannot be created, or another build is writing to that of its name; an earlier one is as it was.
    """

    def __init__(self, path: Path, on_elsewhere: Callable[[Path], None] = lambda _: None) -> None:
        self.path = path
        self.newlines = 0
        self.at_line_start = True
        self._ended = False
        # A fresh name: whatever bears the final one, a link perhaps, is replaced and never written to.
        partial = path.with_name(partial_name(path.name))
        on_elsewhere(partial)
        self._descriptor = -1
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            try:
                self._descriptor = os.open(partial, flags, 0o666)
                # Whoever has the name has the lock, for as long as his build goes on.
                _try_lock(self._descriptor)
                _give_name(partial, path)
            except BaseException:
                self.close()
                partial.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ToolError(
                f"creating the log '{path}': {error.strerror}",
                hint="build in a directory you can write, or name another with --name DIRECTORY/NAME",
            ) from error

    def write(self, data: bytes) -> None:
        """Append *data*; it is in the file when this returns.

        Raises:
            ToolError: the first time it cannot be written; after that nothing is.
        """
        if self._ended or not data:
            return
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self._ended = True
            raise ToolError(
                f"writing the log '{self.path}': {error.strerror}", hint="make space in that directory"
            ) from error
        self.newlines += data.count(b"\n")
        self.at_line_start = data.endswith(b"\n")

    def write_line(self, text: str) -> None:
        """Append a line of ours, on a line of its own."""
        start = b"" if self.at_line_start else b"\n"
        self.write(start + text.encode("utf-8", "replace") + b"\n")

    def close(self) -> None:
        """End the log; what is written later is dropped."""
        self._ended = True
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


def _give_name(partial: Path, path: Path) -> None:
    """Rename the locked file *partial* to *path*, unless that is the log of a build that has not ended.

    Raises:
        ToolError: it is.
        OSError: it cannot be renamed.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            if _link(partial, path):
                return
            continue
        except OSError:
            # A link, a directory, or a file of somebody else's: not what a build of this user is writing to.
            partial.replace(path)
            return
        try:
            if not _try_lock(descriptor):
                raise ToolError(
                    f"creating the log '{path}': another build is writing to it",
                    hint="wait until it has ended, or give this build another --name",
                )
            # While it waited for the lock, another build may have given its own log that name.
            if _is(path, descriptor):
                partial.replace(path)
                return
        finally:
            os.close(descriptor)


def _link(partial: Path, path: Path) -> bool:
    """Rename *partial* to *path* if nothing bears that name; where the file system has no links, in any case."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:
        partial.replace(path)
    else:
        partial.unlink()
    return True


def _try_lock(descriptor: int) -> bool:
    """Lock a file, unless somebody else has; also true where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is(path: Path, descriptor: int) -> bool:
    """Whether *path* still is the file that was opened."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False
