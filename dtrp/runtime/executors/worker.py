"""A worker process: one stage, told what to do over a private channel.

Commands arrive as ``(verb, ...)`` and are obeyed in order; a thread reads them ahead, answers "are you
there" at once, and ends the process when the caller is gone.
"""

from __future__ import annotations

import datetime
import os
import queue
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
from ..links import channels
from ..process_links import LostStage, ProcessLinks
from ..program import StageProgram
from ..stage import StageRunner
from ..transfer import dumps, loads

FOREVER = datetime.timedelta(days=3650)
"""Links wait as long as their user pauses; a peer's death ends the wait at once."""


@dataclass(frozen=True)
class Order:
    """What a worker is started with."""

    program: StageProgram
    config: TrainConfig
    seed: int | None
    record: bool
    store: str  # path of the file through which the workers find each other


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
            self.commands.get()  # linger until the caller says stop or is gone: peers keep their connections
        if self.links is not None:
            self.links.flush()

    def _read(self) -> None:
        try:
            while True:
                command = loads(self.connection.recv_bytes())
                if command[0] == "ping":
                    runner = self.runner
                    self.tell(
                        "pong", runner.tick if runner else -1, runner.meter.phase if runner else "starting"
                    )
                else:
                    self.commands.put(command)
        except (EOFError, OSError):
            os._exit(1)  # the caller is gone
        except BaseException as e:
            self.tell("error", f"{type(e).__name__}: {e}", traceback.format_exc(), None)

    def do_start(self, order: Order) -> None:
        program, config = order.program, order.config
        self.stage = program.stage
        torch.set_num_threads(config.threads)
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
        self.links = ProcessLinks(program.stage, channels(program.train, program.evaluate, program.ties))
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
