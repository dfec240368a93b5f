"""A worker process: one stage, told what to do over a private line.

Batches and commands come in one order over the line from the caller. What the stage has to say goes back over
a socket (voice.py).
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .. import accelerators
from .batch import Feed, Loss, Skip, Update
from .config import TrainConfig
from .environment import Environment
from .links import LostStage, Message
from .program import StageProgram
from .random import random_state, set_random_state
from .registered import Registered
from .replicas import Linked, Replicas
from .routed import Routed, Seats
from .shared import CALLER, Line, SharedLinks
from .stage import Stage, finish
from .transfer import dumps, loads, unsendable
from .vitals import Page, show_life
from .voice import Voice

PATIENCE = 0.005  # seconds that a loss may wait to be told


def pickled_setups(
    programs: Sequence[StageProgram], config: TrainConfig, seed: int | None, record: bool
) -> list[bytes]:
    """Each stage's, to be sent to its process.

    Raises
    ------
    TypeError
        Something in them cannot be.
    """
    ambient = random_state() if seed is None else None
    try:
        return [dumps((p, config, seed, record, ambient), values=True) for p in programs]
    except Exception as e:
        raise TypeError(
            f"{unsendable(vars(config))} cannot be sent to a worker process: {e}. Avoid open "
            f"files, locks and generators in them, or use executor='inline'"
        ) from e


class Worker:
    """Obeys what comes over the line from the caller."""

    def __init__(self, number: int, lines: list[Line], voice: Voice, page: Page, caller: int) -> None:
        self.number, self.links = number, SharedLinks(number, lines)
        self.voice = voice
        self.stage: Stage | None = None
        self.failed = False
        self.unsaid: list[Loss | Skip] = []
        self.said = 0.0  # when, by the clock
        show_life(page, number, self._look, lambda: os._exit(1), caller)

    def _look(self) -> tuple[int, bool, str]:
        if self.stage is None:
            return 0, False, "starting"
        meter = self.stage.meter
        phase = self.stage.phase
        waits = phase.startswith("waiting")
        return meter.done, waits, phase if phase == "idle" else f"{phase}, tick {meter.rounds}"

    def tell(self, *message: Any) -> None:
        """Say something to the caller."""
        plain = message[0] in ("news", "ready")
        self.voice.send(pickle.dumps(message, protocol=5) if plain else dumps(message))

    def run(self) -> None:
        """Until told to stop. After a failure only questions are answered."""
        while True:
            try:
                if self.unsaid and not self.links.has(CALLER):
                    self._say_news()
                channel, message = self.links.take_any(CALLER)
            except LostStage:
                return  # the caller is gone
            try:
                if channel.kind == "feed":
                    self._feed(message)
                    continue
                verb, *arguments = loads(message.values[0])
                if verb == "stop":
                    return
                if self.failed and verb != "ask":
                    continue
                getattr(self, f"do_{verb}")(*arguments)
            except BaseException as e:
                if self.failed:
                    continue
                self.failed = True
                self._say_news()  # of the batches that went well
                self.voice.fail(e, e.peer if isinstance(e, LostStage) else None)
                self.links.close(but=CALLER)  # peers that wait for this stage wait in vain

    def _feed(self, message: Message) -> None:
        if self.failed or self.stage is None:
            return
        structure, evaluates, part, parts, share, lr_scale, batches, inputs, *values = message.values
        target = (
            values[inputs]
            if structure is None
            else pytree.tree_unflatten(values[inputs:], _structure(structure))
        )
        feed = Feed(message.slot, values[:inputs], target, Update(lr_scale, batches), part, parts, share)
        if not evaluates:
            finish(self.stage.feed(feed))
            self._tell_news()
            return
        result = finish(self.stage.answers.evaluate(feed))
        if self.stage.program.is_last:
            self.tell("result", result)

    def do_start(
        self, environment: Environment, registered: Registered, device: torch.device, setup: bytes
    ) -> None:
        environment.apply(device)
        registered.apply()
        self._set_up(*loads(setup))
        environment.apply_filters()
        self.tell("ready")

    def do_renew(self, setup: bytes) -> None:
        """Nothing is in flight: another stage takes the place of this one."""
        self.stage = None  # and its memory is free
        self._set_up(*loads(setup))

    def _set_up(
        self, program: StageProgram, config: TrainConfig, seed: int | None, record: bool, random: Any
    ) -> None:
        torch.set_num_threads(config.threads)
        if random is not None:  # the caller's generators: a single stage draws from them
            set_random_state(random)
        if accelerators.is_one(program.device):
            accelerators.use(program.device)
        seats = Seats(config.replicas or (1,) * program.n_stages)
        members = seats.of(program.stage)
        linked = Linked(self.links, members, self.number) if len(members) > 1 else None
        stage = self.stage = Stage(
            program,
            config,
            Routed(self.links, seats, self.number) if config.replicas else self.links,
            seed=seed,
            record=record,
            replicas=None if linked is None else Replicas(linked, linked),
            turn=seats.turn(self.number),
        )
        if linked is not None:
            linked.meter = stage.meter
        self.links.allow(lambda other: stage.places(seats.stages[other]))

    def do_drain(self, close_group: bool | str) -> None:
        assert self.stage is not None
        finish(self.stage.drain(close_group=close_group))
        self._tell_news()

    def do_call(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        self._tell_news(wait=True)
        self.do_ask(number, method, arguments)

    def do_ask(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        """Also after a failure."""
        assert self.stage is not None
        self._say_news()
        self.tell("reply", number, getattr(self.stage.answers, method)(*arguments))

    def _tell_news(self, *, wait: bool = False) -> None:
        """A loss is never waited for while rounds go on.

        Each word wakes the caller, which costs as much as a small stage's whole round: where rounds are
        short, several losses are said at once, when there is nothing else to do or `PATIENCE` is over.
        """
        assert self.stage is not None
        self.unsaid += self.stage.answers.news(wait=wait)
        if self.unsaid and (wait or time.monotonic() - self.said > PATIENCE):
            self._say_news()

    def _say_news(self) -> None:
        if self.unsaid:
            self.tell("news", self.unsaid)
        self.unsaid, self.said = [], time.monotonic()


@lru_cache(maxsize=256)
def _structure(pickled: bytes) -> pytree.TreeSpec:
    spec: pytree.TreeSpec = loads(pickled)
    return spec


def main(
    number: int,
    n_processes: int,
    lines: list[Line],
    given: list[int],
    descriptors: list[int],
    replies: int,
    page: int,
    caller: int,
) -> None:
    """Entry point of a worker process.

    Parameters
    ----------
    given, descriptors : list of int
        What ``lines``, ``replies`` and ``page`` call descriptors, and their numbers here.
    caller : int
        The process that the worker is not to outlive.
    """
    here = dict(zip(given, descriptors, strict=True))
    voice = Voice(here[replies])
    voice.take_over()
    code = 1
    try:
        ends = [
            Line(i, j, here.get(sends, -1), here.get(receives, -1), here.get(memory, -1), device)
            for i, j, sends, receives, memory, device in lines
        ]
        Worker(number, ends, voice, Page(here[page], n_processes), caller).run()
        voice.finish()
        code = 0
    except OSError:
        pass  # the caller is gone
    except BaseException as e:
        voice.fail(e)
    finally:
        accelerators.forget_lent()
        os._exit(code)  # whatever threads a library has started
