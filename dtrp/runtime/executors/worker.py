"""A worker process: one stage, told what to do over a private channel.

Commands arrive as ``(verb, ...)`` and are obeyed in order; a thread reads them ahead, answers "are you
there" at once, and ends the process when the caller is gone.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import queue
import shutil
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from ..batch import Feed, Report
from ..config import TrainConfig
from ..links import Channel, channels
from ..process_links import LostStage, ProcessLinks
from ..program import StageProgram
from ..random import set_random_state
from ..stage import StageRunner
from ..transfer import dumps, loads

FOREVER = datetime.timedelta(days=3650)
"""Links wait as long as their user pauses; a peer's death ends the wait at once."""


PING = dumps(("ping",))


@dataclass(frozen=True)
class Order:
    """What a worker is started with."""

    program: StageProgram
    config: TrainConfig
    seed: int | None
    record: bool
    store: str  # path of the file through which the workers find each other
    log_level: int  # of the caller's log
    mailboxes: dict[Channel, int]  # descriptors of shared memory, inherited
    random: Any = None  # the caller's generators, where a single stage draws from them


class Worker:
    """Obeys the commands that come over ``connection``."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.sending = threading.Lock()
        self.commands: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.runner: StageRunner | None = None
        self.links: ProcessLinks | None = None
        self.stage = -1
        self.reports: list[Report] = []
        self.folder: str | None = None  # the rendezvous

    def tell(self, *message: Any) -> None:
        data = dumps(message)
        with self.sending:
            self.connection.send_bytes(data)

    def run(self) -> None:
        """Until told to stop. A failure is reported with its traceback, then the process ends."""
        threading.Thread(target=self._read, name="dtrp-commands", daemon=True).start()
        try:
            while True:
                verb, *arguments = self.commands.get()
                if verb == "stop":
                    break
                getattr(self, f"do_{verb}")(*arguments)
        except BaseException as e:
            lost = e.stage if isinstance(e, LostStage) else None
            self.tell("error", f"{type(e).__name__}: {e}", traceback.format_exc(), lost)
            # Linger until the caller says stop or is gone: peers keep their connections.
            while self.commands.get()[0] != "stop":
                pass
            return
        if self.links is not None:
            self.links.flush()

    def _read(self) -> None:
        caller = os.getppid()
        try:
            while True:
                # A child that the caller forked may hold its end of the channel open after its death.
                while not self.connection.poll(2.0):
                    if os.getppid() != caller:
                        raise EOFError
                data = self.connection.recv_bytes()
                if data == PING:
                    self._answer()
                else:
                    self.commands.put(loads(data))
        except (EOFError, OSError):
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
            os._exit(1)  # the caller is gone
        except BaseException as e:
            self.tell("error", f"{type(e).__name__}: {e}", traceback.format_exc(), None)

    def _answer(self) -> None:
        runner = self.runner
        if runner is None:
            self.tell("pong", "starting", None)
        else:
            self.tell("pong", f"{runner.meter.phase}, tick {runner.tick}", runner.stats())

    def do_start(self, order: Order) -> None:
        program, config = order.program, order.config
        self.stage = program.stage
        self.folder = os.path.dirname(order.store)
        _forward_logs(self, order.log_level)
        torch.set_num_threads(config.threads)
        if order.random is not None:
            set_random_state(order.random)
        if program.device.type == "cuda":
            torch.cuda.set_device(program.device)
        dist.init_process_group(
            "gloo",
            store=FileStore(order.store, program.n_stages),
            rank=program.stage,
            world_size=program.n_stages,
            timeout=FOREVER,
        )
        # Collectives apart from the links' point-to-point messages, which other threads receive.
        self.norms = dist.new_group(backend="gloo", timeout=FOREVER) if config.max_grad_norm else None
        self.links = ProcessLinks(
            program.stage, channels(program.train, program.evaluate, program.ties), order.mailboxes
        )
        self.runner = StageRunner(
            program, config, self.links, seed=order.seed, report=self.reports.append, record=order.record
        )
        self.tell("ready", os.getpid())

    def do_tick(self, feed: Feed | None) -> None:
        assert self.runner is not None
        squared_norm = self.runner.begin(feed)
        if self.norms is not None:
            squared_norm = self._sum_over_stages(squared_norm)
        self.runner.finish(squared_norm)
        self._tell_losses()

    def do_call(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        self._tell_losses(wait=True)
        self.tell("reply", number, getattr(self.runner, method)(*arguments))

    def do_evaluate(self, number: int, slot: int, feed: Feed) -> None:
        assert self.runner is not None
        result = self.runner.evaluate(slot, feed)
        if self.runner.program.is_last:
            self.tell("reply", number, result)

    def _sum_over_stages(self, value: float) -> float:
        """The sum over all stages, in stage order as the inline executor has it."""
        mine = torch.tensor([value], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine, group=cast(Any, self.norms))
        return sum(float(v) for v in everyone)

    def _tell_losses(self, *, wait: bool = False) -> None:
        """Losses that the device has finished; a loss is never waited for while ticks go on."""
        while self.reports and (wait or self.reports[0].ready()):
            report = self.reports.pop(0)
            self.tell("loss", report.batch, report.value(), report.skipped)


class _Forwarder(logging.Handler):
    """Hands log records to the caller's log."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self.worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self.worker.tell("log", record.name, record.levelno, self.format(record))


def _forward_logs(worker: Worker, level: int) -> None:
    root = logging.getLogger()
    root.addHandler(_Forwarder(worker))
    root.setLevel(level)


def main(descriptor: int) -> None:
    """Entry point of a worker process; ``descriptor`` is its end of the private channel."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # traffic stays on this machine
    worker = Worker(Connection(descriptor))
    code = 0
    try:
        worker.run()
    except BaseException:
        code = 1
    finally:
        os._exit(code)  # receiving threads never end by themselves
