"""The running pipeline behind a trainer: joint batches in, losses out."""

from __future__ import annotations

from typing import Any

import torch

from .arguments import feeds, n_samples
from .compensation import Joiner, Joint, Tuner
from .config import TrainConfig
from .executors import start
from .host import Host, write_back
from .ledger import Ledger
from .run_state import RunState
from .schedule import drain_ticks


class Session:
    """Starts the stages and feeds them.

    Parameters
    ----------
    host, config
        What to train and how.
    ledger : Ledger
        Where batches and losses are entered.
    joiner : Joiner
        Whose size the tuner sets, if there is one.
    tunes : bool
        Whether to find the joiner's size by measuring.
    resume : RunState or None
        Where to begin.
    kind, record, watchdog
        As for `executors.start`.
    """

    def __init__(
        self,
        host: Host,
        config: TrainConfig,
        ledger: Ledger,
        joiner: Joiner,
        *,
        tunes: bool,
        resume: RunState | None,
        kind: str,
        record: bool,
        watchdog: float,
    ) -> None:
        self.host, self.config, self.ledger, self.joiner = host, config, ledger, joiner
        programs = host.programs()
        self.n_stages = len(programs)
        self.train, self.evaluation = programs[0].train, programs[0].evaluate
        self.names = [  # tensors that each stage holds
            frozenset(n for n, _ in (*p.module.named_parameters(), *p.module.named_buffers()))
            for p in programs
        ]
        self.in_flight = False
        self.seed = self._base_seed(resumes=resume is not None)
        if not host.model.training:
            host.model.train()
        self.executor = start(kind, programs, config, seed=self.seed, record=record, watchdog=watchdog)
        self.tuner = Tuner(host.memory_limits()) if tunes else None
        if resume is not None:
            try:
                self.hand_over(resume)
            except BaseException:
                self.executor.close()
                raise

    def _base_seed(self, *, resumes: bool) -> int | None:
        """The passes' base seed; one stage draws from the ambient generators, as the plain loop does."""
        seed = self.config.seed
        if self.n_stages > 1:
            return int(torch.randint(2**62, ())) if seed is None else seed
        if seed is not None and not resumes:
            torch.manual_seed(seed)
        return None

    def enter(self, joint: Joint) -> None:
        """A batch goes into the pipeline."""
        self.executor.tick(feeds(self.train, self.ledger.entered, joint.tensors, joint.target, joint.update))
        self.ledger.enter(joint.update.batches)
        self.in_flight = True
        if self.config.one_batch_at_a_time:
            self._drain()
        if self.tuner is not None:
            self._tune(self.tuner, n_samples(joint.tensors))
        self.executor.throttle()

    def drain(self) -> None:
        """Until nothing is in flight."""
        if self.in_flight:
            self._drain()
            if self.tuner is not None:
                self.tuner.interrupted()

    def _drain(self) -> None:
        for _ in range(drain_ticks(self.n_stages)):
            self.executor.tick([None] * self.n_stages)
        self.executor.settle()
        self.in_flight = False

    def _tune(self, tuner: Tuner, samples: int) -> None:
        """Let the tuner time what it needs to."""
        what = tuner.entered(samples)
        if what == "go on":
            return
        if self.in_flight:
            self._drain()
        if what == "warm up":
            tuner.warmed_up()
        elif tuner.measured([s.peak_memory for s in self.executor.call("stats")]):
            self.tuner = None
        self.joiner.size = tuner.size

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every stage, all with the same arguments."""
        return self.executor.call(method, [arguments] * self.n_stages)

    def sync(self) -> None:
        """Bring the stages' present weights and buffers into the model."""
        for state in self.executor.call("state"):
            write_back(self.host.model, state)

    def hand_over(self, state: RunState) -> None:
        """Bring the stages to a loaded state."""
        if self.seed is not None and state.counters["seed"] is not None:
            self.seed = state.counters["seed"]
        self.executor.call("load_state", [(state.tensors(names),) for names in self.names])
        self.call("load_training_state", *state.training(self.host.model))
