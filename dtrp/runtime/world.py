"""Who runs a trainer's script: one process, or several that a launcher started together.

What the trainer does besides feeding stages differs then: who plans, whose first weights and seed count, who
writes files.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import accelerators
from ..errors import CheckpointError
from . import launched
from .arguments import n_counted
from .checkpoint import read_checkpoint, write_checkpoint
from .compensation import Mini
from .config import TrainConfig
from .folder import existing
from .handback import Owner, only
from .inline import Inline
from .joint_norm import alone, synchronises
from .materialise import materialise
from .program import StageProgram
from .random import random_state, set_random_state
from .routed import Seats
from .run_state import RunState, concerns
from .training_state import SECTIONS

if TYPE_CHECKING:
    from ..planning import Planning
    from .ranks import Ranks
    from .run import Run
    from .workers import Workers

log = logging.getLogger("dtrp")

_PLAIN = (bool, int, float, str, type(None))
_OWN = ("seed", "threads")  # settings that may differ between ranks


class Alone:
    """This process runs the script by itself."""

    rank = 0
    replicas = (1, 0)  # how many, and which

    def __init__(self, executor: str, watchdog: float) -> None:
        self.executor, self.watchdog = executor, watchdog

    def prepare(self, compiled: Planning, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Plan for this example, unless planned already."""
        compiled.prepare(args, kwargs)

    def first(self, what: str, function: Callable[[], Any]) -> Any:
        """What ``function`` gives where files are written and decisions made."""
        return function()

    def start(
        self,
        programs: Sequence[StageProgram],
        config: TrainConfig,
        *,
        seed: int | None,
        record: bool,
        there: Any = None,
    ) -> Inline | Workers:
        """Start the stages; with worker processes that are ``there``, if they will do."""
        if self.executor == "inline":
            return Inline(programs, config, seed=seed, record=record)
        from .workers import Workers

        if isinstance(there, Workers) and there.renew(programs, config, seed, record):
            return there
        return Workers(programs, config, seed=seed, record=record, watchdog=self.watchdog)

    def same_weights(self, owner: Owner) -> None:
        """Begin with the same tensors everywhere."""

    def materialise(self, owner: Owner, programs: Sequence[StageProgram], init: Any) -> bool:
        """Make real what this process needs of a model on the meta device; whether anything was."""
        return False

    def weight(self, mini: Mini, config: TrainConfig) -> float:
        """The share of this process's mini-batch in that of all replicas."""
        return 1.0

    def due(self, what: str, moment: float) -> bool:
        """Whether this moment (`time.monotonic`) is over. To be asked after every batch."""
        return time.monotonic() >= moment

    def write(self, path: Any, run: Run, *, folder: bool) -> None:
        """Write a run to disk."""
        write_checkpoint(path, run.content(), folder=folder)

    def read(self, path: Any, owner: Owner) -> dict[str, Any]:
        """What a run on disk holds, as far as this process's own tensors are concerned."""
        return read_checkpoint(path)

    def complete(self, state: RunState, owner: Owner) -> RunState:
        """What `read` gave, with all that the stages here need."""
        return state

    def leave(self, error: BaseException | None) -> None:
        """The script is done with its trainer."""


@dataclass
class _Asked:
    """When rank 0 was asked about a moment."""

    at: float
    last: int = 0
    batches: int = 0
    again: int = 1


class Together(Alone):
    """This process is one of several."""

    def __init__(self, seats: Seats, watchdog: float) -> None:
        from .mesh import Mesh
        from .peers import Peers

        super().__init__("torchrun", watchdog)
        self.mesh = Mesh(seats)
        self.peers = Peers(self.mesh, watchdog)
        self.rank = self.mesh.rank
        self.replicas = self.mesh.replicas, self.mesh.replica
        # Loaders shuffle by these, and every process of torch starts with a seed of its own.
        set_random_state(self.first("the generators", random_state))
        self.stages: Ranks | None = None
        self._asked: dict[str, _Asked] = {}
        self._open = contextlib.ExitStack()
        self._open.enter_context(alone())
        if self.rank == 0:
            stages, ranks = self.mesh.n_stages, self.mesh.n_processes
            replicas = f", {self.mesh.replicas} times" if self.mesh.replicas > 1 else ""
            log.info("%d stages on %d ranks of a launcher%s", stages, ranks, replicas)

    def prepare(self, compiled: Planning, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Rank 0 plans, the others follow: a search that ends by the clock may find something else here. What
        is asked of a device on the way is asked of each rank's own, not of the host's first by all."""
        from .ranks import place

        for device in {d for d in compiled.request.devices if d.index is None}:
            accelerators.use(place(device))

        def plan() -> str:
            compiled.prepare(args, kwargs)
            return compiled.planned()

        compiled.adopt(self.first("planning", plan))
        compiled.prepare(args, kwargs)

    def first(self, what: str, function: Callable[[], Any]) -> Any:
        with self.peers.at(what, waits=self.rank != 0):
            return self.mesh.first(what, function)

    def start(  # type: ignore[override]
        self,
        programs: Sequence[StageProgram],
        config: TrainConfig,
        *,
        seed: int | None,
        record: bool,
        there: Any = None,
    ) -> Ranks:
        from .ranks import Ranks

        if self.mesh.replicas > 1 and config.gives_up and any(synchronises(p.module) for p in programs):
            raise ValueError(
                "a model with SyncBatchNorm in several replicas cannot give up batches (on_nonfinite='skip', "
                "autocast=torch.float16), since one replica would not come to where the others wait for it: "
                "use BatchNorm, or on_nonfinite='raise' and torch.bfloat16"
            )
        if there is not None:  # other cuts
            there.close()
            self.mesh.renew()
        with self.peers.at("comparing settings"):
            plain = {k: v if isinstance(v, _PLAIN) else "" for k, v in vars(config).items() if k not in _OWN}
            given = self.mesh.gather("settings", plain, all_replicas=True)
            for rank, theirs in enumerate(given):
                other = next((k for k in plain if theirs[k] != given[0][k]), None)
                if other is not None:
                    raise ValueError(
                        f"{other} is {given[0][other]!r} on rank 0 and {theirs[other]!r} on rank {rank}: "
                        f"give pipe.trainer(...) the same settings on every rank"
                    )
        made = [
            (p.train.stages, p.evaluate.stages, [n for n, _ in p.module.named_parameters()]) for p in programs
        ]
        with self.peers.at("comparing stages"):
            if len(set(map(repr, self.mesh.gather("stages", made, all_replicas=True)))) > 1:
                raise RuntimeError(
                    "the ranks have cut their models into different stages, though by one plan: the script "
                    "must make the same model, in the same modes, on every rank"
                )
        self.stages = Ranks(programs, config, self.peers, seed=seed, record=record)
        return self.stages

    def materialise(self, owner: Owner, programs: Sequence[StageProgram], init: Any) -> bool:
        module = programs[self.mesh.stage].module
        held = [*module.parameters(), *module.buffers()]
        if not any(t.is_meta for t in held):
            return False
        with self.peers.at("reading weights", waits=False):
            materialise(owner.model, held, init)
        return True

    def weight(self, mini: Mini, config: TrainConfig) -> float:
        """Only the last stage needs to know it: all gradients come from its loss."""
        assert self.stages is not None
        if self.mesh.replicas == 1 or self.mesh.stage < self.mesh.n_stages - 1:
            return 1.0
        return self.stages.weight(n_counted(mini.tensors, mini.target, config.ignored))

    def same_weights(self, owner: Owner) -> None:
        """Those of rank 0, as DistributedDataParallel has it."""
        with self.peers.at("handing the first weights round"):
            tensors = [t for _, t in (*owner.named_parameters(), *owner.named_buffers())]
            self.mesh.spread([t for t in tensors if isinstance(t, torch.Tensor)])

    def due(self, what: str, moment: float) -> bool:
        """Rank 0's clock counts. Asking it holds all up, so it says when to ask again: half-way to the
        moment, as batches go."""
        asked = self._asked.setdefault(what, _Asked(time.monotonic()))
        asked.batches += 1
        if asked.batches < asked.again:
            return False

        def look() -> tuple[bool, int]:
            now = time.monotonic()
            since, pace = asked.batches - asked.last, (now - asked.at) / (asked.batches - asked.last)
            half = int((moment - now) / max(pace, 1e-6) / 2)
            asked.at, asked.last = now, asked.batches
            return now >= moment, asked.batches + max(1, min(half, 2 * since))

        over, asked.again = self.first(what, look)
        return bool(over)

    def write(self, path: Any, run: Run, *, folder: bool) -> None:
        """A folder by all ranks at once; a file by rank 0, for which all is gathered."""
        if (not folder or self.stages is None) and run.owner.on_meta:
            raise CheckpointError(
                f"{path}: no rank holds the whole of a model on the meta device, so that it is saved as a "
                f"folder, after the first step; let the path end in '/', or pass format='dcp'"
            )
        if not folder or self.stages is None:
            content, loaded = run.content(), run.resume

            def write() -> None:  # what was loaded in part is there as a whole
                whole = None if loaded is None or not loaded.partial else read_checkpoint(loaded.origin)
                write_checkpoint(path, whole or content, folder=folder)

            self.first("saving", write)
            return
        run.drain()
        parts = self.stages.parts(run.owner.first_names())
        content = run.gather(parts).to_write(run.owner)
        holders = self.stages.holders()
        content |= only(content, lambda name: self.mesh.leads and holders.get(name, 0) == self.mesh.stage)
        if self.rank != 0:  # what is nobody's in particular is rank 0's to write
            ours = {"model", "extra", "loss", *SECTIONS}
            content = {section: v for section, v in content.items() if section in ours}
        with self.peers.at("saving"):
            write_checkpoint(path, content, folder=True, mesh=self.mesh)

    def read(self, path: Any, owner: Owner) -> dict[str, Any]:
        """Of a folder each rank reads what it has a place for; a file is rank 0's to read."""
        if self.first("loading", lambda: existing(Path(path)).is_dir()):
            named = chain(owner.named_parameters(all_names=True), owner.named_buffers())
            real = {name for name, tensor in named if not tensor.is_meta}
            return read_checkpoint(path, lambda entry: concerns(entry, real, training=False))
        content: dict[str, Any] = self.first("loading", lambda: read_checkpoint(path))
        return content

    def complete(self, state: RunState, owner: Owner) -> RunState:
        assert self.stages is not None
        if not state.partial:
            return state
        module, first = self.stages.stage.module, owner.first_names()
        names = {n for n, _ in chain(module.named_parameters(), module.named_buffers())}
        names |= {first[n] for n in names if n in first}
        with self.peers.at("loading", waits=False):
            content = read_checkpoint(state.origin, lambda entry: concerns(entry, names, training=True))
        return RunState.read(content, state.origin)

    def leave(self, error: BaseException | None) -> None:
        if error is not None and self.stages is not None:
            self.stages.abandon(error)
        self._open.close()
        with contextlib.suppress(Exception):
            self.peers.close()
            if self.peers.failure is None:
                self.mesh.close()


def join(executor: str, seats: Seats, watchdog: float) -> Alone:
    """Alone, or together with others, as the user asked and the environment says.

    Raises
    ------
    ValueError
        The number of processes makes no whole pipelines.
    """
    if executor == "torchrun" or (executor == "auto" and launched.world_size() > 1):
        return Together(seats, watchdog)
    if executor == "auto":
        executor = "inline" if seats.replicas == (1,) else "workers"
    return Alone(executor, watchdog)
