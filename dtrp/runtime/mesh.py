"""This process among those that a launcher started: which stage of which replica, and who it talks to how.

    rank = replica * n_processes + process        of a pipeline; stage by stage (`Seats`)

Notes, and all that is gathered or agreed on, go by gloo, whatever the stages' devices are. Each direction of
a pipeline has a communicator of its own: with one for both, activations and gradients could wait for each
other in a circle.

No operation here has a time limit of its own: a stage may compute for hours. Who waits in vain is woken by
`poison`, when peers.py finds that somebody is gone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import accelerators
from . import launched
from .routed import Seats
from .transfer import dumps, loads

_c10d: Any = dist  # what it exports, but does not say so

FOREVER = timedelta(days=365)
NOBODY = 2**20  # a tag that nobody sends with


class OnDevice(NamedTuple):
    """Communicators of the devices' own kind: of the pipeline, for either direction, and of one stage."""

    down: dist.ProcessGroup
    up: dist.ProcessGroup
    sums: dist.ProcessGroup


class Mesh:
    """The processes of one run.

    Parameters
    ----------
    seats : Seats
        Of a pipeline. Twice as many processes make two replicas of it, where each stage has one.

    Attributes
    ----------
    rank, size, process, stage, replica, replicas : int
    leads : bool
        Whether this process speaks for its stage of this replica: its first one.
    pipeline, peers, sums : ProcessGroup
        The processes of this replica; those of this stage, in all replicas, twice.
    down, up : ProcessGroup
        Of the pipeline, for what goes to later stages, and to earlier ones.
    everyone : ProcessGroup
    addresses : list of str
        Of the host of each rank.
    by_agent : bool
        Whether the launcher's own process has the key-value store, rather than rank 0.

    Raises
    ------
    ValueError
        The number of processes makes no whole pipelines.
    """

    def __init__(self, seats: Seats) -> None:
        check(seats)
        self.address = _address()
        if not dist.is_initialized():
            rank, size = launched.rank(), launched.world_size()
            dist.init_process_group(_backend(), store=_store(rank, size), rank=rank, world_size=size)
        self.by_agent = _by_agent()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.seats, self.n_processes, self.n_stages = seats, len(seats.stages), len(seats.replicas)
        self.replicas = self.size // self.n_processes
        self.replica, self.process = divmod(self.rank, self.n_processes)
        self.stage = seats.stages[self.process]
        self.leads = self.process == seats.firsts[self.stage]
        self.pipeline, self.peers = _group(self._by_replica), _group(self._by_stage)
        self._make_ways()
        self.sums = _group(self._by_stage)
        self.everyone = _group([list(range(self.size))])
        self.on_devices: tuple[dist.ProcessGroup, ...] = ()
        for group in self._groups():
            group.set_timeout(FOREVER)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, self.address, group=self.everyone)
        self.addresses: list[str] = found

    def _make_ways(self) -> None:
        self.down, self.up = _group(self._by_replica), _group(self._by_replica)

    @property
    def _by_replica(self) -> list[list[int]]:
        """All ranks, pipeline by pipeline."""
        n = self.n_processes
        return [list(range(first, first + n)) for first in range(0, self.size, n)]

    @property
    def _by_stage(self) -> list[list[int]]:
        """All ranks, together those that have the same stage."""
        starts = range(0, self.size, self.n_processes)
        return [[start + i for start in starts for i in self.seats.of(k)] for k in range(self.n_stages)]

    def renew(self) -> None:
        """Other ways for other stages: in the old ones, receives are posted for what will not come."""
        self._drop((self.down, self.up, *self.on_devices))
        self.on_devices = ()
        self._make_ways()

    def _groups(self) -> Iterator[dist.ProcessGroup]:
        yield from (self.pipeline, self.peers, self.sums, self.down, self.up, self.everyone)

    @property
    def store_address(self) -> str:
        return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"

    @property
    def store(self) -> Any:
        """A connection of its own to the launcher's key-value store."""
        return dist.distributed_c10d._get_default_store().clone()

    def name(self, rank: int) -> str:
        """What to call a rank in messages."""
        replica, process = divmod(rank, self.n_processes)
        whose = f" of replica {replica}" if self.replicas > 1 else ""
        return f"{self.seats.name(process)}{whose} (rank {rank} on {self.addresses[rank]})"

    def stage_of(self, rank: int) -> int:
        """Which stage that rank has, of whatever replica."""
        return self.seats.stages[rank % self.n_processes]

    def names(self) -> list[str]:
        return [self.name(rank) for rank in range(self.size)]

    def on_device(self, device: torch.device) -> OnDevice | None:
        """Communicators for what stays on the stages' devices; ``None`` where it goes through host memory:
        on CPUs, on devices of several kinds, and where ranks share a device."""
        place = self.address, accelerators.identity(device), device.type
        places = self.gather("devices", place, all_replicas=True)
        alike = len({kind for *_, kind in places}) == 1 and len(set(places)) == len(places)
        backend = _backend_of(device.type)
        if not accelerators.is_one(device) or not alike or backend is None:
            return None
        # Else NCCL's own watchdog ends this process when a peer is gone, before peers.py says who that was.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        wanted = self._by_replica, self._by_replica, self._by_stage
        found = OnDevice(*(_group(ranks, backend) for ranks in wanted))
        self.on_devices = tuple(found)
        return found

    # ---- what several say or do together -------------------------------------------------------------------

    def gather(self, what: str, value: Any, *, all_replicas: bool = False) -> list[Any]:
        """``value`` of every stage of this pipeline (or of every rank), in order, on each rank.

        Raises
        ------
        RuntimeError
            Another rank asks something else at this point.
        """
        group = self.everyone if all_replicas else self.pipeline
        given: list[Any] = [None] * (self.size if all_replicas else self.n_processes)
        dist.all_gather_object(given, (what, dumps(value)), group=group)
        first = 0 if all_replicas else self.rank - self.process
        for i, (other, _) in enumerate(given):
            if other != what:
                raise RuntimeError(
                    f"{self.name(first + i)} is at {other} where {self.name(self.rank)} is at {what}: a "
                    f"script must make the same calls to its trainer on every rank"
                )
        who = range(self.size) if all_replicas else self.seats.firsts
        return [loads(given[i][1]) for i in who]

    def first(self, what: str, function: Callable[[], Any]) -> Any:
        """What ``function`` gives on rank 0, on every rank; there alone it is called.

        Raises
        ------
        Exception
            What it raised there.
        """
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told = [dumps((what, function(), None))]
            except Exception as e:
                told = [_packed_error(what, e)]
        dist.broadcast_object_list(told, src=0, group=self.everyone)
        what_there, value, error = loads(told[0])
        if error is not None:
            raise error
        if what_there != what:
            raise RuntimeError(
                f"rank 0 is at {what_there} where rank {self.rank} is at {what}: a script must make the same "
                f"calls to its trainer on every rank"
            )
        return value

    def in_turn(self, give: Callable[[], Any]) -> Iterator[Any]:
        """What ``give`` gives in each stage of this pipeline, one after the other, on all of them: at most
        one stage's is held at a time. Stages get their own untouched."""
        for k in self.seats.firsts:
            mine = k == self.process
            value = give() if mine else None
            data = torch.frombuffer(bytearray(dumps(value)), dtype=torch.uint8) if mine else None
            size = torch.tensor([0 if data is None else data.numel()], device="cpu")
            dist.broadcast(size, group=self.pipeline, group_src=k)
            if data is None:
                data = torch.empty(int(size), dtype=torch.uint8, device="cpu")
            dist.broadcast(data, group=self.pipeline, group_src=k)
            yield value if mine else loads(data.numpy().tobytes())

    def spread(self, tensors: list[torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Overwrite tensors with those of the group's first rank (rank 0's)."""
        group = self.everyone if group is None else group
        for tensor in tensors:
            if tensor.numel() and not tensor.is_meta:
                whole = tensor.detach().cpu().contiguous()
                dist.broadcast(whole, group=group, group_src=0)
                with torch.no_grad():
                    tensor.copy_(whole)

    def barrier(self) -> None:
        dist.all_reduce(torch.zeros(1, device="cpu"), group=self.everyone)

    # ---- ending --------------------------------------------------------------------------------------------

    def poison(self) -> None:
        """Have every operation that waits in these groups fail, from another thread: gloo fails all of a
        group's operations when one has run out of time, here one that nobody answers. (It fails at once, and
        alone, where that rank has left.) Devices come last: what they get of an aborted receive is not to be
        trained with, and an abort may hang."""
        for group in self._groups():
            for other in set(range(group.size())) - {group.rank()}:
                with contextlib.suppress(RuntimeError):
                    dead = group.recv([torch.zeros(1, device="cpu")], other, NOBODY)
                    dead.wait(timedelta(milliseconds=1))
        for group in self.on_devices:
            with contextlib.suppress(RuntimeError):
                group.abort()

    def close(self) -> None:
        """Let go of the groups that this run made."""
        self._drop((*self._groups(), *self.on_devices))

    def _drop(self, groups: Iterable[dist.ProcessGroup]) -> None:
        for group in groups:
            with contextlib.suppress(RuntimeError, ValueError):
                dist.destroy_process_group(group)


def check(seats: Seats) -> None:
    """Refuse a number of processes that makes no whole pipelines.

    Raises
    ------
    RuntimeError, ValueError
    """
    if not dist.is_available():
        raise RuntimeError("executor='torchrun' needs torch.distributed, which this build of torch has not")
    size = dist.get_world_size() if dist.is_initialized() else launched.world_size()
    if size == 1 and not dist.is_initialized():
        raise ValueError(
            "executor='torchrun' in a process that no launcher started (RANK, WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT are not set): run the script as torchrun --nproc-per-node N train.py, or use "
            "executor='workers'"
        )
    n = len(seats.stages)
    if n > len(seats.replicas) and size != n:
        each = " + ".join(map(str, seats.replicas))
        raise ValueError(f"{size} processes for stages of {each}: start {n}, as each has a device of its own")
    if size % n:
        raise ValueError(
            f"{size} processes cannot make pipelines of {n} stages: start a multiple of {n} processes, or "
            f"give n_gpus={size} (or a divisor of it)"
        )


def _group(wanted: list[list[int]], backend: str = "gloo") -> dist.ProcessGroup:
    # Every rank takes part in making each of them: a group that its own ranks make alone torch 2.11 names as
    # an earlier one that is gone, whose addresses are still in the store.
    mine, _ = dist.new_subgroups_by_enumeration(wanted, timeout=FOREVER, backend=backend)
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def _by_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(rank: int, size: int) -> Any:
    """The launcher's key-value store, as if it were empty.

    torchrun keeps one over all its restarts, in which processes that are gone have left their addresses. So
    rank 0 makes a new name for this start, under which everybody else reports with a name of its own, and
    is answered by it: who has read an older start's name is not answered, and reads again.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and not _by_agent()
    store = _c10d.TCPStore(host, port, size, serves, wait_for_workers=False, multi_tenant=True)
    mine = secrets.token_hex(8)
    if rank == 0:
        store.set("dtrp", mine)
        for other in range(1, size):
            name = store.get(f"dtrp/{mine}/{other}").decode()
            store.set(f"dtrp/{mine}/{other}/{name}", "")
        return _c10d.PrefixStore(f"dtrp/{mine}", store)
    while True:
        start = store.get("dtrp").decode()
        store.set(f"dtrp/{start}/{rank}", mine)
        with contextlib.suppress(_c10d.DistStoreError):
            store.wait([f"dtrp/{start}/{rank}/{mine}"], timedelta(seconds=1))
            return _c10d.PrefixStore(f"dtrp/{start}", store)


def _backend() -> str:
    """gloo, and what torch names for the accelerator that is there."""
    kinds = {device.type: _backend_of(device.type) for device in accelerators.here()}
    return ",".join(["cpu:gloo", *(f"{kind}:{named}" for kind, named in kinds.items() if named)])


def _backend_of(kind: str) -> str | None:
    """What torch names for tensors on devices of this kind; not gloo, which wants them on the host."""
    with contextlib.suppress(ValueError):
        named = dist.get_default_backend_for_device(kind)
        return None if named == "gloo" else named
    return None


def _address() -> str:
    """This host's, as the launcher's host sees it; gloo is told to use the interface that has it."""
    host = os.environ.get("MASTER_ADDR", "localhost")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, 9))  # sends nothing
        address: str = sock.getsockname()[0]
        for _, name in socket.if_nameindex():
            if _address_of(name) == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        return address
    return host


def _address_of(interface: str) -> str | None:
    import fcntl

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        packed = fcntl.ioctl(sock, 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        return socket.inet_ntoa(packed[20:24])
    return None


def _packed_error(what: str, error: Exception) -> bytes:
    try:
        return dumps((what, None, error))
    except (TypeError, pickle.PicklingError):
        return dumps((what, None, RuntimeError(f"{type(error).__name__}: {error}")))
