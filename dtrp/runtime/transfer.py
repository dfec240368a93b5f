"""Pickles that carry tensors as plain bytes: what the caller and its workers say to each other.

A tensor arrives as a copy with the same values, dtype and dimension order (channels_last stays so). Nothing
is shared between the processes, so nothing can leak. CUDA tensors travel through host memory.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import cloudpickle
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .links import canonical, dense_order, flat_bytes


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and not obj.is_sparse and not obj.is_quantized and not obj.is_meta:
            plain = canonical(obj.detach().cpu())
            order = dense_order(plain)
            if order is not None:
                data = pickle.PickleBuffer(flat_bytes(plain).numpy().data)
                shape = tuple(plain.shape)
                return _rebuild, (data, plain.dtype, shape, order, obj.requires_grad)
        if isinstance(obj, pytree.TreeSpec) and obj.is_leaf():
            return pytree.tree_structure, (None,)  # torch 2.11 warns whoever unpickles its class of leaves
        return super().reducer_override(obj)


def _rebuild(
    data: Any, dtype: torch.dtype, shape: tuple[int, ...], order: tuple[int, ...], requires_grad: bool
) -> Tensor:
    flat = (
        torch.frombuffer(data, dtype=torch.uint8).clone() if len(data) else torch.empty(0, dtype=torch.uint8)
    )
    permuted = flat.view(dtype).view([shape[d] for d in order])
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return permuted.permute(inverse).requires_grad_(requires_grad)


def dumps(obj: Any) -> bytes:
    """``obj`` as bytes; functions and classes of the user's script travel by value."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(obj)
    return buffer.getvalue()


def loads(data: bytes | memoryview) -> Any:
    """What `dumps` was given. Only for bytes that came over a private channel: unpickling runs code."""
    return pickle.loads(data)
