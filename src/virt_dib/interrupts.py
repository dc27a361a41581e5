# SPDX-License-Identifier: Apache-2.0
"""What ends a build from outside, once, and never in the middle of tidying up: signals, its caller, and time.

Python raises an exception for a signal between any two instructions, also in a ``finally``. What must be
undone whole stands in a :func:`shielded` block; a signal that comes in it is raised at its end. A caller that
cancels is heard where the build waits, which calls :func:`check_cancelled`; so is a limit of time.
"""

from __future__ import annotations

import contextlib
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import NoReturn

from virt_dib.errors import Interrupted, VirtDibError

CHECK_INTERVAL_S = 0.5
"""How long a build may wait for something without a look whether it is cancelled."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Cancellation:
    """Ends the build it was given to; may be used from any thread, from a listener and from a signal handler."""

    def __init__(self) -> None:
        self._wanted = threading.Event()

    def cancel(self) -> None:
        """Have the build end with :class:`virt_dib.errors.Interrupted`, soon. It is too late once it has its files."""
        self._wanted.set()

    @property
    def wanted(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._wanted.is_set()


class Limit:
    """How long something may take; *error* makes what is raised when it takes longer."""

    def __init__(self, seconds: float | None, error: Callable[[], VirtDibError]) -> None:
        self._seconds = seconds
        self._error = error
        self._until_s: float | None = None

    def start(self) -> None:
        """Count from now on; without a number of seconds, never."""
        self._until_s = None if self._seconds is None else time.monotonic() + self._seconds

    def stop(self) -> None:
        """It has ended in time."""
        self._until_s = None

    def extend(self, seconds: float) -> None:
        """Do not count that long."""
        if self._until_s is not None:
            self._until_s += seconds

    def check(self) -> None:
        """Raise the error, once, if it takes too long."""
        if self._until_s is not None and time.monotonic() > self._until_s:
            # What is undone now takes its time, too.
            self._until_s = None
            raise self._error()


class _State(threading.local):
    """Of one thread. Signals reach the main thread alone: Python runs handlers in no other."""

    depth = 0
    came = False
    raised = False
    late = False
    cancellation: Cancellation | None = None
    limits: tuple[Limit, ...] = ()


_state = _State()


def _stop(_number: int, _frame: FrameType | None) -> None:
    _state.came = True
    if _state.depth == 0:
        _raise_once()


def _raise_once() -> None:
    if not (_state.raised or _state.late):
        _state.raised = True
        raise Interrupted


def interrupt() -> NoReturn:
    """End what this thread does as a signal would.

    Raises:
        Interrupted: always.
    """
    _state.came = _state.raised = True
    raise Interrupted


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into :class:`Interrupted`; later ones do not disturb the undoing.

    Signals that were ignored, as nohup does with SIGHUP, stay so. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.came = _state.raised = _state.late = False
    with contextlib.ExitStack() as restored:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                restored.callback(signal.signal, number, signal.signal(number, _stop))
        yield


@contextlib.contextmanager
def cancellable(cancellation: Cancellation | None) -> Iterator[None]:
    """Let *cancellation* end what this thread does in the block, at its next :func:`check_cancelled`.

    See :func:`too_late`, too.
    """
    before, _state.cancellation = _state.cancellation, cancellation
    try:
        check_cancelled()
        yield
    finally:
        _state.cancellation = before
        if _state.late:
            _state.came = _state.late = False


def too_late() -> None:
    """Let nothing more end what this thread does in its :func:`cancellable` block: it has done what was asked for."""
    _state.late = True
    _state.cancellation = None
    _state.limits = ()


@contextlib.contextmanager
def limited(limit: Limit) -> Iterator[None]:
    """Let *limit* end what this thread does in the block, at its next :func:`check_cancelled`."""
    before, _state.limits = _state.limits, (*_state.limits, limit)
    try:
        yield
    finally:
        _state.limits = before
        limit.stop()


@contextlib.contextmanager
def unlimited() -> Iterator[None]:
    """Stop the clocks of all limits in the block: somebody is at the terminal."""
    before, _state.limits = _state.limits, ()
    begun = time.monotonic()
    try:
        yield
    finally:
        _state.limits = before
        for limit in before:
            limit.extend(time.monotonic() - begun)


def check_cancelled() -> None:
    """Raise :class:`Interrupted` when the work of this thread was cancelled: once, and not in a shielded block.

    Raises:
        VirtDibError: that of a limit which has passed.
    """
    cancellation = _state.cancellation
    if _state.depth == 0:
        for limit in _state.limits:
            limit.check()
    if cancellation is not None and cancellation.wanted and _state.depth == 0:
        # What is undone now waits for things, too.
        _state.cancellation = None
        raise Interrupted


def ready(
    readers: Iterable[int], writers: Iterable[int] = (), *, timeout_s: float = CHECK_INTERVAL_S
) -> tuple[set[int], set[int]]:
    """The descriptors that can be read, and those that can be written, when there are any, or none after that time.

    As ``select.select``, which takes none from 1024 on: a program that uses the library may have many open. What has
    ended, or is closed, can be read, and reading tells it.
    """
    wanted = dict.fromkeys(readers, select.POLLIN)
    wanted.update({descriptor: wanted.get(descriptor, 0) | select.POLLOUT for descriptor in writers})
    poll = select.poll()
    for descriptor, events in wanted.items():
        poll.register(descriptor, events)
    found = [(descriptor, events, wanted[descriptor]) for descriptor, events in poll.poll(max(0.0, timeout_s) * 1000)]
    return (
        {descriptor for descriptor, events, asked in found if asked & select.POLLIN and events & ~select.POLLOUT},
        {descriptor for descriptor, events, _ in found if events & (select.POLLOUT | select.POLLERR)},
    )


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Put off :class:`Interrupted` to the end of the block; for work that is short and must not stay half done."""
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1
        if _state.depth == 0 and _state.came:
            _raise_once()


@contextlib.contextmanager
def unshielded() -> Iterator[None]:
    """Within a :func:`shielded` block: let :class:`Interrupted` in for as long as this one takes.

    There is no moment between the two in which it could come without what is undone after this one being undone whole.
    """
    depth = _state.depth
    try:
        _state.depth = 0
        if _state.came:
            _raise_once()
        yield
    finally:
        _state.depth = depth
