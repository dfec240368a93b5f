"""Ctrl-C at safe points only.

A ``KeyboardInterrupt`` that strikes between two halves of a tick would leave stages with different batches.
Inside `held` it waits for a safe point (`check`) or the end of the block; a second Ctrl-C strikes at once.
Only Python's main thread ever gets the signal; elsewhere there is nothing to hold.
"""

from __future__ import annotations

import signal
import threading

# What the module signal wraps, to convert numbers to enumerations and back: a tenth of a caller's time.
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_handler
from types import FrameType
from typing import Any

_SIGINT = int(signal.SIGINT)
_MAIN = threading.main_thread().ident


class _Holder:
    """Stands in for the user's SIGINT handler for a while."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler
        self.came: tuple[int, FrameType | None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.came is not None:
            self.release()
        self.came = number, frame

    def release(self) -> None:
        """Hand on what came."""
        if self.came is not None:
            came, self.came = self.came, None
            self.handler(*came)


class held:
    """Inside, Ctrl-C waits for `check` or the end of the block. May be nested."""

    holder: _Holder | None = None

    def __enter__(self) -> None:
        if threading.get_ident() != _MAIN:
            return
        handler = getsignal(_SIGINT)
        if not isinstance(handler, _Holder) and callable(handler):
            self.holder = _Holder(handler)
            set_handler(_SIGINT, self.holder)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.holder is not None:
            set_handler(_SIGINT, self.holder.handler)
            if error is None:
                self.holder.release()


def check() -> None:
    """A safe point: a Ctrl-C that waits strikes here."""
    if threading.get_ident() == _MAIN:
        holder = getsignal(_SIGINT)
        if isinstance(holder, _Holder):
            holder.release()
