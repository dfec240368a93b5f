"""Every error a user can meet, by meaning.

Wrong arguments are plain ``ValueError``/``TypeError``; what is here says that something about the model,
the plan, a worker or a file stands in the way. Each message says what happened, where, what was expected
and what to do next.
"""

from __future__ import annotations


class DtrpError(Exception):
    """Base of all errors that dtrp raises on purpose."""


class CaptureError(DtrpError):
    """The model could not be turned into a graph: which module, which line of the user's code, why."""


class InfeasiblePlanError(DtrpError):
    """No partition satisfies the limits; the message names the smallest need and where it arises.

    Attributes
    ----------
    smallest_limit : float or None
        A memory limit per stage, in bytes, that a partition was found to meet; None where limits differ
        between stages or memory is not what stands in the way.
    """

    def __init__(self, message: str, *, smallest_limit: float | None = None) -> None:
        super().__init__(message)
        self.smallest_limit = smallest_limit


class PlanMismatchError(DtrpError):
    """A saved plan does not belong to this model, these shapes or this number of stages."""


class WorkerError(DtrpError):
    """A stage failed while running.

    Attributes
    ----------
    stage : int or None
        Index of the stage that failed first (0-based, as in ``pipe.stages``), if it is known.
    remote_traceback : str
        The original traceback, as text; empty if the process died without leaving one.
    """

    def __init__(self, message: str, *, stage: int | None = None, remote_traceback: str = "") -> None:
        super().__init__(message if not remote_traceback else f"{message}\n\n{remote_traceback}")
        self.stage = stage
        self.remote_traceback = remote_traceback

    def again(self) -> WorkerError:
        """What a failed run answers from then on."""
        return WorkerError(
            f"this trainer has failed before and cannot go on: {str(self).splitlines()[0]}",
            stage=self.stage,
            remote_traceback=self.remote_traceback,
        )


class CheckpointError(DtrpError):
    """A checkpoint is truncated, foreign or does not fit; nothing in memory was changed."""


class ExportError(DtrpError):
    """A stage could not be exported to ONNX, or an exported chain does not reproduce the model."""
