"""Who runs a trainer's script: one process, or several that a launcher started together.

What the trainer does besides feeding stages differs then: who plans, whose first weights and seed count, who
writes files.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from . import launched
from .config import TrainConfig
from .handback import Owner
from .inline import Inline
from .program import StageProgram

if TYPE_CHECKING:
    from .ranks import Ranks
    from .workers import Workers

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
    run: Inline | Workers | None = None

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

    def same_weights(self, owner: Owner) -> None:
        """Those of rank 0, as DistributedDataParallel has it."""
        with self.peers.at("handing the first weights round"):
            tensors = [t for _, t in (*owner.named_parameters(), *owner.named_buffers())]
            self.mesh.spread([t for t in tensors if isinstance(t, torch.Tensor)])

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
