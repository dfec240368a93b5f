"""How many bytes operators have alive at once: storages, followed from the making of each to its end."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dtrp.memory import storage_of


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operators make under it; works on fake tensors as on real ones.

    Memory that kernels take and give back inside one operator is not seen.

    Attributes
    ----------
    peak : int
        The most bytes that were alive at once, of storages that were made under this mode.
    """

    def __init__(self, *known: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._known = {storage_of(t) for t in pytree.tree_leaves(known) if isinstance(t, torch.Tensor)}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def now(self) -> int:
        """Bytes that are alive."""
        for key in [key for key, (reference, _) in self._live.items() if reference.expired()]:  # type: ignore[no-untyped-call]
            del self._live[key]
        return sum(size for _, size in self._live.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(out)
        return out

    def note(self, out: Any) -> None:
        """Takes in what an operator gave."""
        alive = self.now  # first forget what has died: its number may come back
        for tensor in pytree.tree_leaves(out):
            # A sparse one (an embedding's gradient) has no storage to ask for; it is small by its purpose.
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._live and key not in self._known:
                    self._live[key] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
                    alive += storage.nbytes()
        self.peak = max(self.peak, alive)
