"""One stage in this process, the others in processes that a launcher started with the same script.

Every rank runs the script and makes the same calls to its trainer; each takes of a batch what its stage
needs, and of the slots of a stage of several ranks its own (`Seats`).
What is asked of all stages is asked on every rank at once (`Mesh`): between rounds nothing holds the ranks
together, so one may be a few batches ahead of another.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import accelerators
from ..errors import WorkerError
from . import launched
from .batch import Feed, Loss, Skip
from .config import TrainConfig
from .evaluation import Measure
from .group_links import GroupLinks
from .inline import Results, as_in_workers, owned, private, told
from .joint_norm import join_norms
from .news import News
from .peers import Peers
from .processes import carrying, talking
from .program import StageProgram
from .random import pass_seed
from .replicas import Group, Replicas
from .routed import Routed
from .stage import Stage, finish
from .stats import StageStats
from .training_state import SECTIONS

log = logging.getLogger("dtrp")

QUESTIONS = ("stats", "take_events", "last_squared_norm", "learning_rates", "training_state")
"""Methods of `Answers` whose answers every rank gets; others are called here alone, on each rank."""


class Ranks:
    """Runs this rank's stage. `Inline` and `Workers` have the same methods.

    Trains the model's own parameters of this stage, in place, where they are on the stage's device.

    Parameters
    ----------
    programs, config, seed, record
        As for `Inline`.
    peers : Peers
        All ranks.
    """

    shares = False  # all of the stages' tensors

    def __init__(
        self,
        programs: Sequence[StageProgram],
        config: TrainConfig,
        peers: Peers,
        *,
        seed: int | None,
        record: bool = False,
    ) -> None:
        mesh = self.mesh = peers.mesh
        self.config, self.peers = config, peers
        self.failure: WorkerError | None = None
        self._draws = seed is not None and any(p.draws for p in programs)
        self._digest = 0  # of all batches so far
        self._warned = False
        # Of a model on the meta device each rank holds its own stage alone.
        self.partial = any(t.is_meta for p in programs for t in p.module.parameters())
        mine, turn = programs[mesh.stage], mesh.seats.turn(mesh.process)
        device = mine.devices[turn[0]] if mine.devices else mine.device
        mine = private(replace(mine, device=place(device)), apart=not self.partial)
        self._slots = 0  # that went in
        with self._told("starting"):
            if accelerators.is_one(mine.device):
                accelerators.use(mine.device)
            ways = mesh.on_device(mine.device)
            self.links = GroupLinks(
                mesh.process,
                mesh.seats.pairs(talking(mine, config)),
                mesh.down,
                mesh.up,
                payload=None if ways is None else (ways.down, ways.up),
                carrying=mesh.seats.pairs(carrying(mine)),
                device=mine.device,
            )
            self.replicas = None
            apart = mesh.replicas > 1  # each pipeline with batches of its own, all by the same list
            if mesh.peers.size() > 1:
                sums, at = (mesh.sums, "cpu") if ways is None else (ways.sums, mine.device)
                self.replicas = Replicas(Group(mesh.peers, overlaps=apart), Group(sums, overlaps=apart), at)
            join_norms(mine.module, self.replicas if apart else None)
            stage = self.stage = Stage(
                mine,
                config,
                Routed(self.links, mesh.seats, mesh.process) if config.replicas else self.links,
                seed=self._own_seed(seed),
                record=record,
                replicas=self.replicas,
                turn=turn,
            )
        self.links.allow(lambda other: stage.places(mesh.seats.stages[other]))
        self.news_of = self.links.news = News(mesh.process, stage.answers.news)
        peers.stage = self.stage

    # ---- training ------------------------------------------------------------------------------------------

    def feed(self, feeds: Sequence[Feed]) -> None:
        """A slot goes in; ``feeds[k]`` is what stage k gets of it."""
        self._digest = _digest(feeds, self._digest)
        feed, seats = feeds[self.mesh.stage], self.mesh.seats
        if seats.at(self.mesh.stage, self._slots) == self.mesh.process:
            feed = feed._replace(inputs=owned(feed.inputs), target=owned(feed.target))
        else:
            feed = feed._replace(inputs=(), target=None)
        self._slots += 1
        with self._told("a round", draws=True):
            finish(self.stage.feed(feed))

    def drain(self, *, close_group: bool | str = False) -> None:
        """Until nothing is in flight in this stage."""
        with self._told("draining", draws=True):
            finish(self.stage.drain(close_group=close_group))
        self._slots += bool(close_group)  # as the stage counts

    def weight(self, count: int) -> float:
        """This replica's share in a mini-batch, of which it has so many."""
        with self._told("comparing batches"):
            return 1.0 if self.replicas is None else self.replicas.share(count)

    def _own_seed(self, seed: int | None) -> int | None:
        """Replicas draw different numbers for their different samples."""
        return seed if seed is None or self.mesh.replica == 0 else pass_seed(seed, self.mesh.replica, 0)

    def throttle(self) -> None:
        """Stages here wait for each other by themselves."""

    def news(self, *, wait: bool = False) -> list[Loss | Skip]:
        """What is known here of finished batches since the last call; ``wait``: of all that went in."""
        with self._told("gathering losses"):
            if wait:
                self.news_of.add(self.stage.answers.news(wait=True))
                given = self.mesh.gather("flush", (self.news_of.rest(), self._digest), all_replicas=True)
                first, n = self.mesh.rank - self.mesh.process, self.mesh.n_processes
                ours = given[first : first + n]
                self.news_of.learn([rest for rest, _ in ours])
                self._compare([digest for _, digest in ours])
                self._look_for_copies([digest for _, digest in given[::n]])
            return self.news_of.take()

    def _compare(self, digests: Sequence[int]) -> None:
        """Stages that were given different batches would train on nonsense without a word."""
        first = self.mesh.rank - self.mesh.process
        for process, digest in enumerate(digests):
            if digest != digests[0]:
                raise WorkerError(
                    f"rank {first} and rank {first + process} were given different batches, but belong to "
                    f"one pipeline: shuffle alike on every rank (DataLoader(..., generator="
                    f"torch.Generator().manual_seed(0))), or give the loader sampler=trainer.sampler(dataset)"
                )

    def _look_for_copies(self, digests: Sequence[int]) -> None:
        """Replicas that train on the same batches are a waste, and surely not meant."""
        if len(set(digests)) < len(digests) and self.mesh.rank == 0 and not self._warned and any(digests):
            self._warned = True
            log.warning(
                "replicas were given the same batches: give the loader sampler=trainer.sampler(dataset), "
                "so that each gets samples of its own"
            )

    # ---- questions -----------------------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[Sequence[Feed]], measure: Measure | None) -> Results:
        """``measure`` of every batch, in order, then its totals: of all replicas, on every rank; without one,
        this replica's outputs. ``batches`` gives lists of feeds, one per stage."""
        results: list[Any] = []
        with self._told("evaluating"):
            self.stage.answers.begin_evaluation(measure)
        try:
            for feeds in batches:
                with self._told("evaluating", draws=True):
                    result = None
                    if self.mesh.leads:
                        result = finish(self.stage.answers.evaluate(feeds[self.mesh.stage]))
                    if measure is None:
                        result = self.mesh.gather("predict", result)[-1]
                if measure is None:
                    yield result
                else:
                    results.append(result)
            if measure is None:
                return
            with self._told("evaluating"):
                results.append(self.stage.answers.totals())
                results = results if self.stage.program.is_last and self.mesh.leads else []
                given = self.mesh.gather("evaluate", results, all_replicas=True)
        finally:
            self.stage.answers.end_evaluation()
        yield from (result for of_rank in given for result in of_rank)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """A method of every stage's `Answers`, after the rounds due by now; in stage order."""
        if method == "load_training_state":
            saved, seed, *rest = arguments
            arguments = (saved, self._own_seed(seed), *rest)
        with self._told(method):
            answer = getattr(self.stage.answers, method)(*arguments)
            return self.mesh.gather(method, answer) if method in QUESTIONS else [answer]

    def parts(self, names: Mapping[str, str]) -> list[dict[str, Any]]:
        """Every stage's `Answers.training_state`, with others' tensors on the meta device."""
        with self._told("saving"):
            mine = self.stage.answers.training_state(names)
            given = self.mesh.gather("saving", _without_tensors(mine))
            given[self.mesh.stage] = mine
            return given

    def holders(self) -> dict[str, int]:
        """Which stage has each tensor of the model: the first of those that do."""
        with self._told("saving"):
            given = self.mesh.gather("saving", list(self.stage.answers.state()["tensors"]))
        return {name: k for k in reversed(range(len(given))) for name in given[k]}

    def states(self) -> Iterator[dict[str, Any]]:
        """Every stage's state, one after the other: each rank hears all of the model once (or of its own
        stage, where it has no place for more)."""
        if self.partial:
            yield self.stage.answers.state()
            return
        with self._told("handing weights round"):
            yield from self.mesh.in_turn(self.stage.answers.state)

    def glance(self) -> list[StageStats] | None:
        """The stages' latest known measurements: none are, without asking."""
        return None

    def rescued(self) -> tuple[list[Loss | Skip], list[dict[str, Any]]]:
        """After a failure: what is known here, and what this rank's stage has trained; others' is not to be
        had."""
        return self.news_of.take(), [self.stage.answers.state()]

    def abandon(self, error: BaseException) -> None:
        """The script leaves its trainer by an error: the others need not wait."""
        if self.failure is None:
            text = f"the script on {self.mesh.name(self.mesh.rank)} left its trainer: {_line(error)}"
            self.failure = self.peers.report(WorkerError(text, stage=self.mesh.stage))

    def close(self) -> None:
        """Let go of everything; may be called twice."""
        if self.failure is None:
            with self._told("closing"):
                self.links.finish()
                self.mesh.barrier()

    # ---- failing -------------------------------------------------------------------------------------------

    @contextmanager
    def _told(self, doing: str, *, draws: bool = False) -> Iterator[None]:
        """What goes wrong here is told to all, and what went wrong elsewhere is raised here."""
        if self.failure is not None:
            raise self.failure.again()
        draw = [self.stage.program.device] if draws and self._draws else []
        try:
            with self.peers.at(doing), as_in_workers(self.config.threads, draw):
                yield
        except GeneratorExit:
            raise
        except BaseException as e:
            self.failure = e if isinstance(e, WorkerError) else self.peers.report(told(self.mesh.stage, e))
            if isinstance(e, Exception) and self.failure is not e:
                raise self.failure from e
            raise


def _without_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's training state as far as another rank needs to know it."""
    parameters = state["parameters"]
    if parameters is None:
        return dict(state)
    far = {
        key: {
            n: t.to("meta") if isinstance(t, Tensor) and t.layout is torch.strided else t
            for n, t in v.items()
        }
        for key, v in parameters.items()
        if key in SECTIONS
    }
    return {**state, "parameters": {**parameters, **far}}


def place(device: torch.device) -> torch.device:
    """A stage's device on this host: one that was named without a number is the one of this rank."""
    if not accelerators.is_one(device) or device != torch.device(device.type):
        return device
    there = accelerators.here()
    return there[launched.local_rank() % len(there)]


def _digest(feeds: Sequence[Feed], before: int) -> int:
    """Of a few values of each tensor of a batch, whatever stage gets it."""
    for feed in feeds:
        for value in (*feed.inputs, *pytree.tree_leaves(feed.target)):
            if isinstance(value, Tensor) and value.device.type == "cpu" and value.layout is torch.strided:
                some = value.detach().reshape(-1)[:: max(1, value.numel() // 64)]
                before = zlib.crc32(repr(some.tolist()).encode(), before)
    return before


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
