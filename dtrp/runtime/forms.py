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
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .links import canonical, dense_order, flat_bytes
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


def take_apart(values: Sequence[Any]) -> Parcel:
    """Tensors become rows of bytes (host memory), numbers eight bytes, everything else a pickle."""
    form: list[Spec] = []
    payload: list[Tensor] = []
    numbers = bytearray()
    pickled: list[bytes] = []
    for value in values:
        if isinstance(value, Tensor):
            plain = canonical(value if value.device.type == "cpu" else value.cpu())
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


def put_together(form: Form, behind: memoryview, fill: Callable[[list[Tensor]], None]) -> list[Any]:
    """The values of a message.

    Parameters
    ----------
    form : Form
    behind : memoryview
        Numbers, and lengths and bytes of what was pickled.
    fill : callable
        Fills rows of bytes with the payload.
    """
    values: list[Any] = []
    rows: list[Tensor] = []
    at = 8 * sum(spec[0] in "ifb" for spec in form)
    number = 0
    for spec in form:
        kind = spec[0]
        if kind == "t":
            _, dtype, shape, order = spec
            dense = torch.empty([shape[d] for d in order], dtype=dtype, device="cpu")
            rows.append(
                dense.reshape(-1).view(torch.uint8) if dense.numel() else torch.empty(0, dtype=torch.uint8)
            )
            if order != tuple(range(len(order))):
                dense = dense.permute(sorted(range(len(order)), key=order.__getitem__))
            values.append(dense)
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
    fill(rows)
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
