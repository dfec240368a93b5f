"""The compiler: any model or weighted DAG to balanced stages. Knows nothing of training or processes."""

from .partition import Partition, StageModel, StageOption, partition

__all__ = ["Partition", "StageModel", "StageOption", "partition"]
