"""The compiler: any model or weighted DAG to balanced stages. Knows nothing of training or processes."""

from .partition import DeviceClass, Partition, StageModel, StageOption, partition

__all__ = ["DeviceClass", "Partition", "StageModel", "StageOption", "partition"]
