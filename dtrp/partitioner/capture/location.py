"""Where in the user's code a call comes from: the innermost stack frame outside torch and this package."""

from __future__ import annotations

import os
import sys
import traceback
from itertools import islice
from types import FrameType

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep


def user_location() -> str:
    """``"file.py:123"`` of the user's line that is running now, ``""`` if there is none."""
    frame = user_frame()
    return f"{short_path(frame.f_code.co_filename)}:{frame.f_lineno}" if frame is not None else ""


def user_frame() -> FrameType | None:
    """The innermost frame of the user's code that is running now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def asking_frame() -> FrameType | None:
    """The innermost frame that is not of this package: a library's or the user's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def asking_place() -> tuple[str, int, int | None] | None:
    """The file, line and column of the expression that it is at, where they are known."""
    frame = asking_frame()
    if frame is None:
        return None
    line, _, column, _ = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
    return frame.f_code.co_filename, line or frame.f_lineno, column


def raised_at(error: BaseException) -> str:
    """``"file.py:123"`` of the innermost user's line that ``error`` passed through."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if is_users(file):
            found = f"{short_path(file)}:{line}"
    return found


def short_path(file: str) -> str:
    """The path as a user would name it: from site-packages or the working directory on, else whole."""
    for marker in ("site-packages" + os.sep, "dist-packages" + os.sep):
        if marker in file:
            return file.rsplit(marker, 1)[1]
    here = os.getcwd() + os.sep
    return file.removeprefix(here)


def is_ours(file: str) -> bool:
    """Whether a file is this package's."""
    return file.startswith(_HERE)


def is_users(file: str) -> bool:
    """Whether a file is none of torch's or this package's."""
    # Generated code ("<string>", "<eval_with_key>.3") has no file that a user could open.
    return not (file.startswith((_TORCH, _HERE, "<")) or file.endswith(("contextlib.py", "functools.py")))
