"""A worker's voice: all that it says goes to the caller over one socket, in order.

Also what is printed and logged, and why it failed. Only what libraries write to descriptors 1 and 2 by
themselves goes where the caller's goes.
"""

from __future__ import annotations

import io
import logging
import pickle
import socket
import struct
import sys
import threading
import traceback
from typing import Any

LENGTH = struct.Struct("<Q")


class Voice:
    """The worker's end of the socket; several threads may speak."""

    def __init__(self, descriptor: int) -> None:
        self.socket = socket.socket(fileno=descriptor)
        self.speaking = threading.RLock()
        self.streams = [_Printed(self, name, k) for k, name in ((1, "stdout"), (2, "stderr"))]

    def take_over(self) -> None:
        """From now on, what is printed and logged here appears at the caller's."""
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(s, encoding="utf-8", errors="backslashreplace", write_through=True)
            for s in self.streams
        )
        logging.getLogger().addHandler(_Forwarder(self))

    def tell(self, *message: Any) -> None:
        """Something that anybody can read."""
        self.send(pickle.dumps(message, protocol=5))

    def send(self, data: bytes) -> None:
        """A pickled message."""
        with self.speaking:
            if len(data) < 1 << 16:
                self.socket.sendall(LENGTH.pack(len(data)) + data)
            else:
                self.socket.sendall(LENGTH.pack(len(data)))
                self.socket.sendall(data)

    def fail(self, error: BaseException, lost: int | None = None) -> None:
        """The last words; ``lost``: the stage whose end is the cause."""
        self.finish()
        self.tell("error", f"{type(error).__name__}: {error}", traceback.format_exc(), lost)

    def finish(self) -> None:
        """End lines that are not finished."""
        for stream in self.streams:
            stream.finish()


class _Printed(io.RawIOBase):
    """Tells what is written line by line."""

    def __init__(self, voice: Voice, name: str, descriptor: int) -> None:
        self.voice, self.name, self.descriptor = voice, name, descriptor
        self.rest = b""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor  # for processes that are started here

    def write(self, data: Any) -> int:
        with self.voice.speaking:
            lines, end, self.rest = (self.rest + bytes(data)).rpartition(b"\n")
            if end:
                self.voice.tell("print", self.name, (lines + end).decode(errors="replace"))
        return len(data)

    def finish(self) -> None:
        if self.rest:
            self.write(b"\n")


class _Forwarder(logging.Handler):
    """Hands log records to the caller's log."""

    def __init__(self, voice: Voice) -> None:
        super().__init__()
        self.voice = voice

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text, where = self.format(record), (record.pathname, record.lineno, record.funcName)
            self.voice.tell("log", record.name, record.levelno, text, *where)
        except Exception:  # nobody hears any more, or the script's text does not take its arguments
            self.handleError(record)
