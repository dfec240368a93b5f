"""dtrp: any PyTorch model, cut into balanced stages and trained as a decoupled pipeline."""

from .compile import Pipeline, Stage, compile
from .errors import (
    CaptureError,
    CheckpointError,
    DtrpError,
    ExportError,
    InfeasiblePlanError,
    PlanMismatchError,
    WorkerError,
)
from .partitioner.plan import Plan
from .runtime.predictors import Predictor
from .runtime.trainer import Trainer
from .version import __version__

__all__ = [
    "CaptureError",
    "CheckpointError",
    "DtrpError",
    "ExportError",
    "InfeasiblePlanError",
    "Pipeline",
    "Plan",
    "PlanMismatchError",
    "Predictor",
    "Stage",
    "Trainer",
    "WorkerError",
    "__version__",
    "compile",
]
