"""An export's folder: written aside and moved into place when everything is good."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import ExportError
from ...onnx.manifest import NAME

_OURS = re.compile(rf"stage_\d+\.onnx(\.data)?|{re.escape(NAME)}")


def check_target(directory: Path, overwrite: bool) -> Path:
    """The folder to write, if it may be written; links in its path resolved.

    Raises
    ------
    ExportError
        Something lies there already: a file, an earlier export without ``overwrite``, or other files.
    """
    directory = directory.resolve()
    if not directory.exists():
        return directory
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file; export_onnx writes a folder: choose another name")
    names = sorted(os.listdir(directory))
    if foreign := [n for n in names if not _OURS.fullmatch(n)]:
        raise ExportError(
            f"{directory} exists and holds what is no export ({', '.join(foreign[:3])}"
            f"{', ...' if len(foreign) > 3 else ''}): choose a new or an empty folder"
        )
    if names and not overwrite:
        raise ExportError(
            f"{directory} exists and holds an export: choose another folder, or pass overwrite=True "
            f"(`--overwrite`) to replace it"
        )
    return directory


@contextmanager
def written_aside(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``directory`` that takes its place when the block ends well; else nothing is left."""
    directory = check_target(directory, overwrite)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    except OSError as e:
        raise ExportError(f"{directory} cannot be written: {e}") from e
    try:
        yield aside
        mask = os.umask(0)
        os.umask(mask)
        aside.chmod(0o777 & ~mask)  # mkdtemp's is for its maker only
        _put(aside, directory, overwrite)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put(aside: Path, directory: Path, overwrite: bool) -> None:
    """Move the finished folder into place; an earlier export goes only once it has been replaced."""
    check_target(directory, overwrite)  # again: exporting takes time, and others may have written there
    try:
        if directory.exists() and os.listdir(directory):
            with tempfile.TemporaryDirectory(
                prefix=f".{directory.name}.", suffix=".old", dir=directory.parent
            ) as old:
                earlier = Path(old) / directory.name
                directory.rename(earlier)
                try:
                    aside.rename(directory)
                except OSError:
                    earlier.rename(directory)
                    raise
        else:
            aside.rename(directory)
    except OSError as e:
        raise ExportError(f"the finished export cannot be moved to {directory}: {e}") from e
