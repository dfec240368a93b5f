"""The memory that a tensor lies in, also where it is sparse and has no storage that torch would name."""

from __future__ import annotations

import math

import torch


def storage_of(tensor: torch.Tensor) -> int:
    """Identifies the memory that a tensor lies in, as long as that lives; a sparse one has it for itself."""
    return id(tensor) if tensor.layout != torch.strided else int(tensor.untyped_storage()._cdata)


def bytes_of(tensor: torch.Tensor) -> int:
    """Of the memory that a tensor lies in."""
    return sum(part.untyped_storage().nbytes() for part in parts_of(tensor))


def parts_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The dense tensors that it is made of."""
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    near = (tensor.crow_indices, tensor.col_indices) if rows else (tensor.ccol_indices, tensor.row_indices)
    return near[0](), near[1](), tensor.values()


def strides_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Its strides; those of a contiguous one, where it has none."""
    if tensor.layout == torch.strided:
        return tensor.stride()
    return tuple(math.prod(tensor.shape[i + 1 :]) for i in range(tensor.dim()))


def same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both begin at the same place in memory."""
    if a.layout != torch.strided or b.layout != torch.strided:
        return a is b
    return a.data_ptr() == b.data_ptr()
