"""What a message between processes looks like: a note of fixed size, and the bytes of its tensors.

A *form* says of each value whether it is a tensor, and of which dtype, shape and dimension order. It is told
once, with the first message of that form, and has a number from then on: the messages of a steady run
describe no tensor.

    note      kind, flags, slot, number of the form, place and size of the payload, length of what follows
    behind    the form, where it is new; the values that are no tensors, pickled; small payloads
    payload   the tensors' bytes, each part aligned: in shared memory, or behind the note if they are few
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .links import Message, canonical, dense_order, flat_bytes
from .transfer import dumps, loads

NOTE = struct.Struct("<BBxxiqqqId")
ALIGNMENT = 64
NEW_FORM, SKIP = 1, 2  # flags
BEHIND = -1  # the place of a payload that comes with the note

Form = tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]] | None, ...]

_PLAIN = frozenset((int, float, bool, str, bytes, type(None)))  # what any pickler writes alike


class Note(NamedTuple):
    """The fixed part of a message."""

    kind: int
    flags: int
    form: int
    slot: int
    place: int
    size: int  # bytes of the payload
    behind: int  # bytes that follow the note
    scale: float


class Parcel(NamedTuple):
    """A message's values, taken apart."""

    form: Form
    payload: list[Tensor]  # rows of bytes
    rest: bytes  # what is no tensor


def take_apart(values: Sequence[Any], device: torch.device | str = "cpu") -> Parcel:
    """Tensors become rows of bytes on ``device``, everything else a pickle."""
    form: list[Any] = []
    payload: list[Tensor] = []
    rest: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            plain = canonical(value.to(device))
            order = dense_order(plain)
            if order is not None:
                form.append((plain.dtype, tuple(plain.shape), order))
                payload.append(flat_bytes(plain))
                continue
        form.append(None)
        rest.append(value)
    pickled = (
        b"" if not rest else pickle.dumps(rest, 5) if _PLAIN.issuperset(map(type, rest)) else dumps(rest)
    )
    return Parcel(tuple(form), payload, pickled)


class Written(NamedTuple):
    """A message, ready to be sent."""

    flags: int
    form: int
    behind: bytes
    payload: list[Tensor]  # rows of bytes, unless they are at the end of ``behind``
    size: int  # of all rows, wherever they are


class Writer:
    """A sender's knowledge of forms."""

    def __init__(self) -> None:
        self.forms: dict[Form, int] = {}

    def write(
        self, message: Message, most_behind: int, device: torch.device | str = "cpu", *, apart: bool = False
    ) -> Written:
        """``most_behind``: bytes of a payload that may come with the note, unless all are to go ``apart``."""
        parcel = take_apart(message.values, device)
        *starts, size = places(parcel.payload)
        form, behind = self.forms.get(parcel.form), parcel.rest
        flags = SKIP if message.skip else 0
        if form is None:
            form = self.forms[parcel.form] = len(self.forms)
            described = pickle.dumps(parcel.form)
            behind = struct.pack("<I", len(described)) + described + behind
            flags |= NEW_FORM
        if size > most_behind or apart:
            return Written(flags, form, behind, parcel.payload, size)
        packed = bytearray(size)
        for start, row in zip(starts, parcel.payload, strict=True):
            packed[start : start + row.numel()] = row.numpy().tobytes()
        return Written(flags, form, behind + packed, [], size)


class Reader:
    """A receiver's knowledge of forms."""

    def __init__(self) -> None:
        self.forms: dict[int, Form] = {}

    def form(self, note: Note, behind: memoryview) -> tuple[Form, memoryview]:
        """A message's form, and what is behind its note without a description of it."""
        if note.flags & NEW_FORM:
            (length,) = struct.unpack_from("<I", behind)
            self.forms[note.form] = pickle.loads(behind[4 : 4 + length])
            behind = behind[4 + length :]
        return self.forms[note.form], behind


def blanks(form: Form, device: torch.device | str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """Tensors for a message of this form, and the rows of bytes that they consist of."""
    tensors: list[Tensor] = []
    rows: list[Tensor] = []
    for spec in form:
        if spec is not None:
            dtype, shape, order = spec
            dense = torch.empty([shape[d] for d in order], dtype=dtype, device=device)
            rows.append(dense.reshape(-1).view(torch.uint8) if dense.numel() else dense.new_empty(0).byte())
            if order != tuple(range(len(order))):
                dense = dense.permute(sorted(range(len(order)), key=order.__getitem__))
            tensors.append(dense)
    return tensors, rows


def copy_behind(rows: Sequence[Tensor], behind: memoryview, size: int) -> None:
    """Fill rows of bytes with a payload that came with the note."""
    if size:
        copy_rows(rows, torch.frombuffer(behind[len(behind) - size :], dtype=torch.uint8))


def copy_rows(rows: Sequence[Tensor], source: Tensor) -> None:
    """Fill rows of bytes from where they were placed."""
    *starts, _ = places(rows)
    for start, row in zip(starts, rows, strict=True):
        if row.numel():
            row.copy_(source[start : start + row.numel()])


def put_together(form: Form, rest: bytes | memoryview, tensors: Sequence[Tensor]) -> list[Any]:
    """The values of a message: ``tensors`` of `blanks`, and others of ``rest``, behind which more may lie."""
    given = iter(tensors)
    others = iter(loads(rest) if None in form else ())
    return [next(others if spec is None else given) for spec in form]


def places(payload: Sequence[Tensor]) -> list[int]:
    """Where each row begins, and where the last one ends."""
    sizes = (-(-row.numel() // ALIGNMENT) * ALIGNMENT for row in payload)
    return list(accumulate(sizes, initial=0))
