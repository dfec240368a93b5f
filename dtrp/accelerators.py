"""What is asked of accelerators: by torch.accelerator and the module of a device's kind, and only here.

Everything else takes devices as they are and asks this file, so that no kind is special. On a machine without
any, `here` is empty, and nothing else in this file runs but what says so.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import torch


def here() -> list[torch.device]:
    """The accelerators of this machine, of the kind that torch is for."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        return []
    return [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]


def is_one(device: torch.device) -> bool:
    """Whether work on this device goes on after the call that started it has returned."""
    return device.type not in ("cpu", "meta")


def name(device: torch.device) -> str:
    """What its maker calls it."""
    return str(torch.get_device_module(device).get_device_name(device))


def identity(device: torch.device) -> str:
    """The same in all processes of a host that have this device, and only there: where each process is shown
    its own device alone (CUDA_VISIBLE_DEVICES), all call theirs number 0. Parts of one (MIG) are the same, as
    they are to NCCL. Also of no accelerator."""
    if not is_one(device):
        return str(device)
    known = torch.get_device_module(device).get_device_properties(device)
    slot = [getattr(known, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    return str(getattr(known, "uuid", device)) if None in slot else ":".join(map(str, slot))


def memory(device: torch.device) -> int:
    """Bytes that it has."""
    return torch.accelerator.get_memory_info(device)[1]


def most_allocated(device: torch.device) -> int:
    """Bytes that this process's tensors have taken at most."""
    return torch.accelerator.max_memory_allocated(device)


def use(device: torch.device) -> None:
    """What names no number means this device from now on, in this process. (One without a number is the one
    in use.)"""
    if device.index is not None:
        torch.accelerator.set_device_index(device)


def in_use() -> torch.device:
    """What `use` said last."""
    return here()[torch.accelerator.current_device_index()]


def has(device: torch.device, tensor: torch.Tensor) -> bool:
    """Whether a tensor is there. Also of no accelerator."""
    place = in_use() if is_one(device) and device.index is None else device
    return tensor.device == place or tensor.device.type == place.type == "cpu"


def wait(device: torch.device) -> None:
    """Until all that was started there is done. (On no accelerator it is.)"""
    if is_one(device):
        torch.accelerator.synchronize(device)


def beside(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, what is started waits for nothing that was started outside. May be entered again and again; of
    no accelerator, it does nothing."""
    return torch.Stream(device) if is_one(device) else nullcontext()


def give_back(device: torch.device) -> None:
    """Memory of tensors that are gone is other processes' to have, which else stays this one's. (Of no
    accelerator, it does nothing.)"""
    if is_one(device):
        gc.collect()
        torch.accelerator.empty_cache()


def read(numbers: Sequence[torch.Tensor]) -> list[float]:
    """What they are: by one look at a device, not one each; on the host few are read faster than stacked."""
    if len(numbers) < 16 and not any(is_one(number.device) for number in numbers):
        return [float(number) for number in numbers]
    found: list[float] = torch.stack([number.reshape(()) for number in numbers]).double().tolist()
    return found


def used_here(tensor: torch.Tensor) -> None:
    """A tensor made `beside` is read outside: its memory is not to be used again before that is done."""
    if is_one(tensor.device):
        tensor.record_stream(torch.accelerator.current_stream(tensor.device))


def lends(device: torch.device) -> bool:
    """Whether processes of a host can have memory there together: CUDA's, with torch's own allocator as it is
    by default. Others refuse, or ask for rights that containers lack; ROCm's events fail after 32 uses
    (ROCm/rocm-systems#1949)."""
    told = "".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    told = told.replace(" ", "").lower()
    other = "expandable_segments:true" in told or "backend:cudamallocasync" in told
    return device.type == "cuda" and torch.version.hip is None and not other


def forget_lent() -> None:
    """At the end of a process that does not end by itself: torch's counters of who has its memory are files
    in /dev/shm, which nobody else would remove."""
    with contextlib.suppress(OSError):
        mine = f"/dev/shm/torch_{os.getpid()}_"
        for file in {one for one in Path("/proc/self/maps").read_text().split() if one.startswith(mine)}:
            os.unlink(file)


class Lent(NamedTuple):
    """Memory of a device that two processes have, and when it was filled and emptied there. What waits for
    these marks is the device, in the stream in use; a mark that was never made is not waited for."""

    memory: torch.Tensor  # bytes
    filled: Any
    emptied: Any

    @classmethod
    def make(cls, device: torch.device, size: int) -> Lent:
        mark = torch.get_device_module(device).Event
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        return cls(memory, mark(interprocess=True), mark(interprocess=True))

    def handle(self) -> bytes:
        """What the other process unpickles. As long as it has the memory, this process keeps it."""
        return bytes(ForkingPickler.dumps(tuple(self)))


class Pace:
    """Keeps a host from running further ahead of its device than some rounds: each one's work has memory."""

    def __init__(self, device: torch.device, most: int = 4) -> None:
        self.device, self.most = device, most
        self._marks: deque[torch.Event] = deque()

    def end_round(self) -> None:
        """All work of a round is on its way; of no accelerator, it is done."""
        if is_one(self.device):
            self._marks.append(mark(self.device))
            if len(self._marks) > self.most:
                self._marks.popleft().synchronize()


def mark(device: torch.device, *, timed: bool = False) -> torch.Event:
    """An event behind what was started there until now; whether it has passed, and when, can be asked."""
    event = torch.Event(device, enable_timing=timed)
    event.record(torch.accelerator.current_stream(device))
    return event


def seconds(start: torch.Event, end: torch.Event) -> float:
    """Between two timed events that have passed."""
    return float(start.elapsed_time(end)) / 1e3


# ---- random numbers ----------------------------------------------------------------------------------------


def seed(device: torch.device, number: int) -> None:
    """Start the device's generator."""
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    with torch.accelerator.device_index(index):
        torch.get_device_module(device).manual_seed(number)


def random_state(device: torch.device) -> torch.Tensor:
    """Of its generator."""
    state: torch.Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: torch.Tensor) -> None:
    torch.get_device_module(device).set_rng_state(state, device)


def random_states() -> list[torch.Tensor]:
    """Of all generators, where this process has begun to use accelerators: asking would begin it."""
    kind: Any = torch.accelerator.current_accelerator()
    module: Any = None if kind is None else torch.get_device_module(kind)
    begun = module is not None and getattr(module, "is_initialized", module.is_available)  # not all can say
    used = begun and begun()
    return [random_state(device) for device in here()] if used else []


def set_random_states(states: list[torch.Tensor]) -> None:
    """What `random_states` gave, where there are as many devices."""
    if states and len(states) == len(here()):
        for device, state in zip(here(), states, strict=True):
            set_random_state(device, state)
