"""The compiler: any model or weighted DAG, cut into balanced stages. Knows nothing of training or processes."""

from .partition import Partition, StageModel, StageOption, partition

__all__ = ["Partition", "StageModel", "StageOption", "partition"]
