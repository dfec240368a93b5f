"""dtrp: any PyTorch model, cut into balanced stages and trained as a decoupled pipeline.

The public names are imported when they are first used: `dtrp.onnx`, which runs exported stages where they
are deployed, must work without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    CaptureError,
    CheckpointError,
    DtrpError,
    ExportError,
    InfeasiblePlanError,
    PlanMismatchError,
    WorkerError,
)
from .version import __version__

if TYPE_CHECKING:
    from .compiling import compile
    from .partitioner.plan import Plan
    from .pipeline import Pipeline
    from .runtime.handback import load_weights
    from .runtime.predictors import Predictor
    from .runtime.trainer import Trainer
    from .simulation.cluster import Cluster, Link
    from .simulation.result import Simulation
    from .simulation.run import simulate
    from .stages import Stage
    from .training_report import TrainingReport

__all__ = [
    "CaptureError",
    "CheckpointError",
    "Cluster",
    "DtrpError",
    "ExportError",
    "InfeasiblePlanError",
    "Link",
    "Pipeline",
    "Plan",
    "PlanMismatchError",
    "Predictor",
    "Simulation",
    "Stage",
    "Trainer",
    "TrainingReport",
    "WorkerError",
    "__version__",
    "compile",
    "load_weights",
    "simulate",
]

# No module of the package may be called like one of these: importing it would hide the name.
_HOMES = {
    "Cluster": ".simulation.cluster",
    "Link": ".simulation.cluster",
    "Pipeline": ".pipeline",
    "Plan": ".partitioner.plan",
    "Predictor": ".runtime.predictors",
    "Simulation": ".simulation.result",
    "Stage": ".stages",
    "Trainer": ".runtime.trainer",
    "TrainingReport": ".training_report",
    "compile": ".compiling",
    "load_weights": ".runtime.handback",
    "simulate": ".simulation.run",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name], __name__), name)
        globals()[name] = value
        return value
    if name in ("callbacks", "integrations", "onnx", "partitioner", "runtime"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
