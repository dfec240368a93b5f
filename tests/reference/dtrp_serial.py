"""The training algorithm once more, tick by tick, in one loop: what the runtime is measured against.

Stages are plain modules in a row, each taking what the one before gives: a tensor, or a tuple of tensors (so
a value for a stage far downstream is handed through). There is no graph and no executor: at every tick the
schedule's formulas say which batch a stage forwards and which it backwards. Nothing here may import dtrp.

Stages are k = 1..K as in the papers (``stages[k - 1]``). Batches are numbered 0, 1, ... in the order fed. A
tick that feeds nothing (while draining) leaves an empty slot behind that travels through the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

LossFunction = Callable[[Any, Any], Tensor]
Values = Tensor | tuple[Tensor, ...]

# What a method's name stands for; every knob can still be given by hand.
METHODS: dict[str, dict[str, Any]] = {
    "bp": {"recompute": False, "predictor": "none"},
    "dtr": {"recompute": True, "predictor": "none"},
    "dtrp": {"recompute": True, "predictor": "auto"},
    "fdg": {"recompute": False, "predictor": "none"},
    "adl": {"recompute": False, "predictor": "none"},
}


# --- The schedule ---------------------------------------------------------------------------------------


def forwarded_slot(t: int, k: int) -> int:
    """Which slot stage k forwards at tick t."""
    return t - k + 1


def backwarded_slot(t: int, k: int, n_stages: int) -> int:
    """Which slot stage k recomputes and backwards at tick t."""
    return t - 2 * n_stages + k + 1


def forward_horizon(k: int, n_stages: int, aim: str) -> int:
    """Updates, in batches, that the first (for the last stage: the only) forward looks ahead."""
    if aim == "stage":
        return 2 * (n_stages - k) - 1 if k < n_stages else 0
    return 2 * n_stages - k - 2 if k < n_stages else n_stages - 1


def backward_horizon(k: int, n_stages: int, aim: str) -> int:
    """Updates, in batches, that the recompute pass and its backward look ahead."""
    return 0 if aim == "stage" else k - 1


# --- Weight prediction ----------------------------------------------------------------------------------


def auto_predictor(optimizer: torch.optim.Optimizer) -> str:
    """The predictor that "auto" stands for."""
    if type(optimizer) is torch.optim.SGD:
        return "geometric" if optimizer.param_groups[0]["momentum"] else "none"
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        return "adam"
    return "difference"


def predict(
    name: str, weight: Tensor, group: dict[str, Any], state: dict[str, Any], previous: Tensor | None, s: float
) -> Tensor:
    """The weight s updates ahead; always a new tensor. ``previous`` is its value before the last update."""
    ahead = weight.detach().clone()
    lr = float(group["lr"])
    if s == 0 or name == "none":
        return ahead
    if name == "linear":
        velocity = state.get("momentum_buffer")
        return ahead if velocity is None else ahead - s * lr * velocity
    if name == "geometric":
        velocity = state.get("momentum_buffer")
        if velocity is None:
            return ahead
        m = float(group["momentum"])
        return ahead - lr * velocity * ((m - m ** (s + 1)) / (1 - m))
    if name == "difference":
        return ahead if previous is None else ahead + s * (ahead - previous)
    if name == "adam":
        if "exp_avg" not in state:
            return ahead
        beta1, beta2 = group["betas"]
        step = int(state["step"])
        mean = state["exp_avg"] / (1 - beta1**step)
        variance = state["exp_avg_sq"] / (1 - beta2**step)
        decay = lr * group["weight_decay"] if group.get("decoupled_weight_decay") else 0.0
        return ahead * (1 - s * decay) - s * lr * mean / (variance.sqrt() + group["eps"])
    raise ValueError(name)


# --- Stages ---------------------------------------------------------------------------------------------


@dataclass
class LivePass:
    """A pass with its autograd graph: the weights it was taken at are leaves of their own."""

    x: Values
    output: Values
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Cell:
    """One entry of the published table.

    ``version`` is j of W_j, the weights after j - 1 turns of the stage's own clock, which also advances
    while the pipeline fills; ``updates`` counts optimizer steps that really happened.
    """

    tick: int
    stage: int
    part: str  # "forward", "recompute", "backward"
    batch: int
    version: int
    updates: int


@dataclass
class StageState:
    """What a stage carries from tick to tick."""

    module: nn.Module
    optimizer: torch.optim.Optimizer | None
    scheduler: Any
    predictor: str
    previous: dict[str, Tensor] = field(default_factory=dict)  # weights before the last update
    inputs: dict[int, Values] = field(default_factory=dict)  # by batch, waiting for the recompute pass
    graphs: dict[int, LivePass] = field(default_factory=dict)  # by batch, where nothing is recomputed
    version: int = 1
    updates: int = 0
    backwards: int = 0

    def predicted(self, s: float) -> dict[str, Tensor]:
        """All weights s updates ahead, as fresh leaves."""
        groups = {}
        if self.optimizer is not None:
            groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        weights = {}
        for name, p in self.module.named_parameters():
            if id(p) in groups:
                ahead = predict(
                    self.predictor,
                    p,
                    groups[id(p)],
                    self.optimizer.state.get(p, {}),
                    self.previous.get(name),
                    s,
                )
            else:
                ahead = p.detach().clone()
            weights[name] = ahead.requires_grad_(p.requires_grad)
        return weights

    def run(self, x: Values, weights: dict[str, Tensor], trace: bool) -> Values:
        """Forward on other weights; without ``trace`` buffers stay as they are."""
        replaced = dict(weights)
        if not trace:
            replaced |= {name: b.clone() for name, b in self.module.named_buffers()}
        return functional_call(self.module, replaced, (x,))

    def collect(self, weights: dict[str, Tensor]) -> None:
        """Add the gradients taken at other weights to those of the true ones."""
        for name, p in self.module.named_parameters():
            grad = weights[name].grad
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad + grad

    def update(self) -> None:
        """Step the optimizer."""
        self.previous = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.updates += 1


# --- The simulator --------------------------------------------------------------------------------------


class SerialPipeline:
    """K sequential stages trained as one decoupled pipeline, tick by tick.

    Parameters
    ----------
    stages
        Plain modules in a row; they are trained in place.
    optimizer, lr_scheduler
        Parameters -> optimizer, optimizer -> scheduler (stepped once per update); one of each per stage.
    loss_fn
        (output, target) -> scalar.
    recompute, predictor
        Default: what the method's name stands for. ``recompute`` may be a list, one entry per stage.
    horizon
        Which moment predictions aim at: "stage" or "common".
    pass_seed
        (seed, batch, stage), both 0-based -> seed of the pass's random numbers. Unused for one stage,
        which draws from the ambient generator as a plain loop does.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        optimizer: Callable[[Any], torch.optim.Optimizer],
        loss_fn: LossFunction,
        *,
        method: str = "dtrp",
        recompute: bool | Sequence[bool] | None = None,
        predictor: str | None = None,
        horizon: str = "common",
        horizon_scale: float = 1.0,
        lr_shrink: float = 1.0,
        grad_shrink: float = 1.0,
        accumulate: int = 1,
        lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        seed: int = 0,
        pass_seed: Callable[[int, int, int], int] | None = None,
    ) -> None:
        self.n_stages = len(stages)
        self.loss_fn = loss_fn
        self.method = method
        if recompute is None:
            recompute = METHODS[method]["recompute"]
        if isinstance(recompute, bool):
            recompute = [recompute] * self.n_stages
        self.recompute = [*recompute[:-1], False]  # the last stage never recomputes
        self.horizon = horizon
        self.horizon_scale = horizon_scale
        self.grad_shrink = grad_shrink
        self.accumulate = accumulate
        self.seed = seed
        self.pass_seed = pass_seed
        self.stages: list[StageState] = []
        for k, module in enumerate(stages, start=1):
            parameters = list(module.parameters())
            opt = optimizer(parameters) if parameters else None
            if opt is not None:
                for group in opt.param_groups:
                    group["lr"] = group["lr"] * lr_shrink ** (self.n_stages - k)
            name = predictor or METHODS[method]["predictor"]
            if name == "auto":
                name = auto_predictor(opt) if opt is not None else "none"
            scheduler = lr_scheduler(opt) if lr_scheduler is not None and opt is not None else None
            self.stages.append(StageState(module, opt, scheduler, name))
        self.tick = 0
        self.batches: list[tuple[Values, Any]] = []
        self.slots: dict[int, int] = {}  # tick at which it was fed -> batch
        self.activations: dict[tuple[int, int], Values] = {}  # (stage that takes it, batch)
        self.gradients: dict[tuple[int, int], list[Tensor | None]] = {}
        self.finished: dict[int, float] = {}
        self.record: list[Cell] = []

    # -- what users of the simulator call

    @property
    def losses(self) -> list[float]:
        """Losses in batch order."""
        return [self.finished[b] for b in sorted(self.finished)]

    def step(self, x: Values, target: Any) -> None:
        """Feed one batch: one tick."""
        self.batches.append((x, target))
        batch = len(self.batches) - 1
        if self.method == "bp":
            self.back_propagate(batch)
        else:
            self.slots[self.tick + 1] = batch
            self.run_tick()

    def flush(self) -> None:
        """Empty ticks until every batch has been trained by every stage."""
        while self.slots:
            self.run_tick()

    def in_flight(self) -> int:
        """Batches that some stage has yet to train."""
        return len(self.slots)

    # -- one tick

    def run_tick(self) -> None:
        """All stages do their parts of the next tick."""
        self.tick += 1
        t, last = self.tick, self.n_stages
        # What is made at tick t is seen by neighbours at t + 1: new messages wait aside until all are done.
        activations, gradients = self.activations, self.gradients
        self.activations, self.gradients = {}, {}
        for k in range(1, last + 1):
            forward = self.slots.get(forwarded_slot(t, k))
            backward = self.slots.get(backwarded_slot(t, k, last))
            if k < last:
                if backward is not None:
                    self.backward_part(k, backward, gradients.pop((k, backward)))
                if t >= k:  # the stage's own clock starts when the first batch can have reached it
                    self.stages[k - 1].version += 1
                if forward is not None:
                    x = self.batches[forward][0] if k == 1 else activations.pop((k, forward))
                    self.forward_part(k, forward, x)
            else:
                if forward is not None:
                    x = self.batches[forward][0] if k == 1 else activations.pop((k, forward))
                    self.last_stage(forward, x)
                if t >= k:
                    self.stages[k - 1].version += 1
        assert not activations, "an activation was not taken at the tick after it was made"
        assert not gradients, "a gradient was not taken at the tick after it was made"
        self.slots.pop(backwarded_slot(t, 1, last), None)

    def forward_part(self, k: int, batch: int, x: Values) -> None:
        """The first forward of a stage before the last."""
        stage = self.stages[k - 1]
        weights = stage.predicted(self.ahead(forward_horizon(k, self.n_stages, self.horizon)))
        if self.recompute[k - 1]:
            stage.inputs[batch] = x
            with torch.no_grad(), self.randomness(k, batch):
                output = stage.run(x, weights, trace=False)
        else:
            x = self.leaf(k, x)
            with self.randomness(k, batch):
                output = stage.run(x, weights, trace=True)
            stage.graphs[batch] = LivePass(x, output, weights)
        self.note(k, "forward", batch)
        self.activations[k + 1, batch] = detached(output)

    def backward_part(self, k: int, batch: int, gradients: list[Tensor | None]) -> None:
        """Recompute (where the graph was not kept), backward, send the gradient on, step."""
        stage = self.stages[k - 1]
        if self.recompute[k - 1]:
            weights = stage.predicted(self.ahead(backward_horizon(k, self.n_stages, self.horizon)))
            x = self.leaf(k, stage.inputs.pop(batch))
            with self.randomness(k, batch):
                live = LivePass(x, stage.run(x, weights, trace=True), weights)
            self.note(k, "recompute", batch)
        else:
            live = stage.graphs.pop(batch)
        self.note(k, "backward", batch)
        pairs = [
            (value, grad * self.grad_shrink)
            for value, grad in zip(tensors(live.output), gradients, strict=True)
            if grad is not None and value.requires_grad
        ]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        self.after_backward(k, batch, live)

    def last_stage(self, batch: int, x: Values) -> None:
        """Forward, loss, backward and step of the stage that computes the loss."""
        k = self.n_stages
        stage = self.stages[k - 1]
        weights = stage.predicted(self.ahead(forward_horizon(k, self.n_stages, self.horizon)))
        x = self.leaf(k, x)
        with self.randomness(k, batch):
            live = LivePass(x, stage.run(x, weights, trace=True), weights)
            loss = self.loss_fn(live.output, self.batches[batch][1])
        self.note(k, "forward", batch)
        self.note(k, "backward", batch)
        (loss / self.accumulate).backward()
        self.finished[batch] = loss.item()
        self.after_backward(k, batch, live)

    def after_backward(self, k: int, batch: int, live: LivePass) -> None:
        """Hand the input's gradient upstream, step if this backward was the last of its window."""
        stage = self.stages[k - 1]
        if k > 1:
            self.gradients[k - 1, batch] = [x.grad for x in tensors(live.x)]
        stage.collect(live.weights)
        stage.backwards += 1
        if stage.backwards % self.accumulate == 0:
            stage.update()

    def back_propagate(self, batch: int) -> None:
        """One batch through all stages and back: plain back-propagation."""
        x, target = self.batches[batch]
        for k, stage in enumerate(self.stages, start=1):
            with self.randomness(k, batch):
                x = stage.module(x)
        loss = self.loss_fn(x, target)
        (loss / self.accumulate).backward()
        self.finished[batch] = loss.item()
        for stage in self.stages:
            stage.backwards += 1
            if stage.backwards % self.accumulate == 0:
                stage.update()

    # -- small parts

    def ahead(self, horizon: int) -> float:
        """s: a horizon in batches as updates, scaled."""
        return self.horizon_scale * horizon / self.accumulate

    def leaf(self, k: int, x: Values) -> Values:
        """A stage's input as the start of its own autograd graph."""
        x = detached(x)
        for value in tensors(x):
            value.requires_grad_(k > 1 and value.is_floating_point())
        return x

    def note(self, k: int, part: str, batch: int) -> None:
        stage = self.stages[k - 1]
        self.record.append(Cell(self.tick, k, part, batch, stage.version, stage.updates))

    def randomness(self, k: int, batch: int) -> SeededPass:
        """Both passes of a batch through a stage draw the same random numbers."""
        if self.n_stages == 1 or self.pass_seed is None:
            return SeededPass(None)
        return SeededPass(self.pass_seed(self.seed, batch, k - 1))


def tensors(values: Values) -> tuple[Tensor, ...]:
    """One or several, as a tuple."""
    return (values,) if isinstance(values, Tensor) else values


def detached(values: Values) -> Values:
    """The same values without history."""
    return values.detach() if isinstance(values, Tensor) else tuple(v.detach() for v in values)


class SeededPass:
    """Seeds torch's global generator for a block and puts it back afterwards."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        if self.seed is not None:
            self.before = torch.get_rng_state()
            torch.manual_seed(self.seed)

    def __exit__(self, *exc: object) -> None:
        if self.seed is not None:
            torch.set_rng_state(self.before)


def simple_pass_seed(seed: int, batch: int, stage: int) -> int:
    """A seed per pass, for tests that need none in particular."""
    return (seed * 1_000_003 + batch * 1_009 + stage) % (1 << 31)


def train(pipeline: SerialPipeline, batches: Sequence[tuple[Values, Any]]) -> list[float]:
    """Feed all batches and drain; gives the losses in batch order."""
    for x, target in batches:
        pipeline.step(x, target)
    pipeline.flush()
    assert all(math.isfinite(loss) for loss in pipeline.losses)
    return pipeline.losses
