"""Who runs a trainer's script: one process, or several that a launcher started together.

What the trainer does besides feeding stages differs then: who plans, whose first weights and seed count, who
writes files.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..errors import CheckpointError
from . import launched
from .arguments import n_counted
from .checkpoint import read_checkpoint, write_checkpoint, write_together
from .compensation import Mini
from .config import TrainConfig
from .folder import existing
from .handback import Owner, only
from .inline import Inline
from .loss import ignored_target
from .materialise import materialise
from .program import StageProgram
from .random import random_state, set_random_state
from .training_state import SECTIONS

if TYPE_CHECKING:
    from .ranks import Ranks
    from .run import Run
    from .workers import Workers

LOOKS = 16  # batches between two looks at the clock that all share

log = logging.getLogger("dtrp")


class Planned(Protocol):
    """What is asked of the compiled model here."""

    @property
    def n_stages(self) -> int: ...
    def prepare(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None: ...
    def planned(self) -> str: ...
    def adopt(self, text: str) -> None: ...


class Alone:
    """This process runs the script by itself."""

    rank = 0
    replicas = (1, 0)  # how many, and which

    def __init__(self, executor: str, watchdog: float) -> None:
        self.executor, self.watchdog = executor, watchdog

    def prepare(self, compiled: Planned, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
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
        if self.executor == "auto":
            self.executor = "inline" if len(programs) == 1 else "workers"
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

    def due(self, batch: int, moment: float) -> bool:
        """Whether this moment (`time.monotonic`) is over, after so many batches."""
        return time.monotonic() >= moment

    def write(self, path: Any, run: Run, *, folder: bool) -> None:
        """Write a run to disk."""
        write_checkpoint(path, run.content(), folder=folder)

    def read(self, path: Any) -> dict[str, Any]:
        """What a run on disk holds."""
        return read_checkpoint(path)

    def leave(self, error: BaseException | None) -> None:
        """The script is done with its trainer."""


class Together(Alone):
    """This process is one of several."""

    def __init__(self, n_stages: int, watchdog: float) -> None:
        from .mesh import Mesh
        from .peers import Peers

        super().__init__("torchrun", watchdog)
        self.mesh = Mesh(n_stages)
        self.peers = Peers(self.mesh, watchdog)
        self.rank = self.mesh.rank
        self.replicas = self.mesh.replicas, self.mesh.replica
        # Loaders shuffle by these, and every process of torch starts with a seed of its own.
        set_random_state(self.first("the generators", random_state))
        self.stages: Ranks | None = None
        if self.rank == 0:
            replicas = f", {self.mesh.replicas} times" if self.mesh.replicas > 1 else ""
            log.info("%d stages on as many ranks of a launcher%s", n_stages, replicas)

    def prepare(self, compiled: Planned, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Rank 0 plans, the others follow: a search that ends by the clock may find something else here."""

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
        return self.stages.weight(n_counted(mini.tensors, mini.target, ignored_target(config.loss_fn)))

    def same_weights(self, owner: Owner) -> None:
        """Those of rank 0, as DistributedDataParallel has it."""
        with self.peers.at("handing the first weights round"):
            tensors = [t for _, t in (*owner.named_parameters(), *owner.named_buffers())]
            self.mesh.spread([t for t in tensors if isinstance(t, torch.Tensor)])

    def due(self, batch: int, moment: float) -> bool:
        """Rank 0's clock counts; all ask at the same batches, now and then, since asking holds them up."""
        return batch % LOOKS == 0 and bool(self.first("autosave", lambda: time.monotonic() >= moment))

    def write(self, path: Any, run: Run, *, folder: bool) -> None:
        """A folder by all ranks at once; a file by rank 0, for which all is gathered."""
        if not folder and self.stages is not None and self.stages.partial:
            raise CheckpointError(
                f"{path}: no rank holds the whole of a model on the meta device, so that it is saved as a "
                f"folder; let the path end in '/', or pass format='dcp'"
            )
        if not folder or self.stages is None:
            content = run.content()
            self.first("saving", lambda: write_checkpoint(path, content, folder=folder))
            return
        run.drain()
        parts = self.stages.parts(run.owner.first_names())
        content = run.gather(parts).to_write(run.owner)
        holders = self.stages.holders()
        content |= only(content, lambda name: holders.get(name, 0) == self.mesh.stage)
        if self.rank != 0:  # what is nobody's in particular is rank 0's to write
            ours = {"model", "extra", "loss", *SECTIONS}
            content = {section: v for section, v in content.items() if section in ours}
        with self.peers.at("saving"):
            write_together(path, content, self.mesh)

    def read(self, path: Any) -> dict[str, Any]:
        """Of a folder each rank reads what it needs; a file is rank 0's to read."""
        if self.first("loading", lambda: existing(Path(path)).is_dir()):
            return read_checkpoint(path)
        content: dict[str, Any] = self.first("loading", lambda: read_checkpoint(path))
        return content

    def leave(self, error: BaseException | None) -> None:
        if error is not None and self.stages is not None:
            self.stages.abandon(error)
        with contextlib.suppress(Exception):
            self.peers.close()
            if self.peers.failure is None:
                self.mesh.close()


def join(executor: str, n_stages: int, watchdog: float) -> Alone:
    """Alone, or together with others, as the user asked and the environment says.

    Raises
    ------
    ValueError
        The number of processes makes no whole pipelines.
    """
    if executor == "torchrun" or (executor == "auto" and launched.world_size() > 1):
        return Together(n_stages, watchdog)
    return Alone(executor, watchdog)
