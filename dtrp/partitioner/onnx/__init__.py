"""One ONNX file per stage, and the manifest that chains them.

stages of the eval graph -> batch.py: which sizes follow the batch
                         -> stage.py: torch.export, then torch's ONNX exporter
                         -> names.py: the model's own names
                         -> verify.py: onnxruntime against the model
                         -> folder.py: moved into place
"""

from .export import export_chain

__all__ = ["export_chain"]
