"""What a message between processes looks like: a note of fixed size, and the bytes of its tensors.

A *form* says of each value what it is: a tensor's dtype, shape and dimension order, that it is a number,
``None``, or something pickled. It is told once, with the first message of that form, and has a number from
then on: the messages of a steady run describe nothing.

    note      kind, flags, slot, number of the form, place and size of the payload, length of what follows
    behind    the form, where it is new; numbers (8 bytes each); pickled values; small payloads
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

Spec = tuple[Any, ...]  # ("t", dtype, shape, order) or ("i",), ("f",), ("b",), ("n",), ("p",)
Form = tuple[Spec, ...]


class Pickled(bytes):
    """An object that has been pickled already."""


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
    numbers: bytes
    pickled: list[bytes]


def take_apart(values: Sequence[Any], device: torch.device | str = "cpu") -> Parcel:
    """Tensors become rows of bytes on ``device``, numbers eight bytes, everything else a pickle."""
    form: list[Spec] = []
    payload: list[Tensor] = []
    numbers = bytearray()
    pickled: list[bytes] = []
    for value in values:
        if isinstance(value, Tensor):
            plain = canonical(value.to(device))
            order = dense_order(plain)
            if order is not None:
                form.append(("t", plain.dtype, tuple(plain.shape), order))
                payload.append(flat_bytes(plain))
                continue
        if value is None:
            form.append(("n",))
        elif type(value) is bool:
            form.append(("b",))
            numbers += struct.pack("<q", value)
        elif type(value) is int and -(2**63) <= value < 2**63:
            form.append(("i",))
            numbers += struct.pack("<q", value)
        elif type(value) is float:
            form.append(("f",))
            numbers += struct.pack("<d", value)
        else:
            form.append(("p",))
            pickled.append(value if isinstance(value, Pickled) else dumps(value))
    return Parcel(tuple(form), payload, bytes(numbers), pickled)


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
        form, behind = self.forms.get(parcel.form), small_part(parcel)
        flags = SKIP if message.skip else 0
        if form is None:
            form = self.forms[parcel.form] = len(self.forms)
            described = pack_form(parcel.form)
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
            self.forms[note.form] = unpack_form(behind[4 : 4 + length])
            behind = behind[4 + length :]
        return self.forms[note.form], behind


def blanks(form: Form, device: torch.device | str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """Tensors for a message of this form, and the rows of bytes that they consist of."""
    tensors: list[Tensor] = []
    rows: list[Tensor] = []
    for spec in form:
        if spec[0] == "t":
            _, dtype, shape, order = spec
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


def put_together(form: Form, behind: memoryview, tensors: Sequence[Tensor]) -> list[Any]:
    """The values of a message.

    Parameters
    ----------
    form : Form
    behind : memoryview
        Numbers, and lengths and bytes of what was pickled.
    tensors : sequence of Tensor
        Those of `blanks`.
    """
    values: list[Any] = []
    given = iter(tensors)
    at = 8 * sum(spec[0] in "ifb" for spec in form)
    number = 0
    for spec in form:
        kind = spec[0]
        if kind == "t":
            values.append(next(given))
        elif kind == "n":
            values.append(None)
        elif kind == "p":
            (length,) = struct.unpack_from("<Q", behind, at)
            values.append(loads(behind[at + 8 : at + 8 + length]))
            at += 8 + length
        else:
            (value,) = struct.unpack_from("<d" if kind == "f" else "<q", behind, number)
            values.append(bool(value) if kind == "b" else value)
            number += 8
    return values


def small_part(parcel: Parcel) -> bytes:
    """Numbers and pickles, as `put_together` expects them."""
    return b"".join(
        [parcel.numbers, *(part for p in parcel.pickled for part in (struct.pack("<Q", len(p)), p))]
    )


def places(payload: Sequence[Tensor]) -> list[int]:
    """Where each row begins, and where the last one ends."""
    sizes = (-(-row.numel() // ALIGNMENT) * ALIGNMENT for row in payload)
    return list(accumulate(sizes, initial=0))


def pack_form(form: Form) -> bytes:
    return pickle.dumps(form)


def unpack_form(data: memoryview) -> Form:
    form: Form = pickle.loads(data)
    return form
