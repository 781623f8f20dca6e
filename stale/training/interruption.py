"""Ctrl-C and SIGTERM while training: they wait until the state is one that can be saved and continued exactly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from stale.errors import interruption

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Inside its ``with``, a signal is noted for :meth:`raise_if_noted`; a second one breaks off at once.

    Only the main thread can handle signals: in another one nothing is noted, and they do what they did before.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self._at_once = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def raise_if_noted(self) -> None:
        """Raise what was noted, as a KeyboardInterrupt or a Terminated."""
        if self.noted is not None:
            raise interruption(self.noted)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For long work that changes nothing worth saving: inside, a signal breaks off where it arrives."""
        self.raise_if_noted()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._at_once or self.noted is not None:
            raise interruption(number)
        self.noted = number
