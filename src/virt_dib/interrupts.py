# SPDX-License-Identifier: Apache-2.0
"""Signals that end a build: once, and never in the middle of tidying up.

Python raises an exception for a signal between any two instructions, also in a ``finally``. What must be
undone whole stands in a :func:`shielded` block; a signal that comes in it is raised at its end.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from virt_dib.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _State:
    """Of the main thread, the only one that Python runs handlers in."""

    depth = 0
    came = False
    raised = False


def _stop(_number: int, _frame: FrameType | None) -> None:
    _State.came = True
    if _State.depth == 0:
        _raise_once()


def _raise_once() -> None:
    if not _State.raised:
        _State.raised = True
        raise Interrupted


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into :class:`Interrupted`; later ones do not disturb the undoing.

    Signals that were ignored, as nohup does with SIGHUP, stay so. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.came = _State.raised = False
    with contextlib.ExitStack() as restored:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                restored.callback(signal.signal, number, signal.signal(number, _stop))
        yield


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Put off :class:`Interrupted` to the end of the block; for work that is short and must not stay half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
        if _State.depth == 0 and _State.came:
            _raise_once()
