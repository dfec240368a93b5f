"""One ONNX file per stage, and the manifest that chains them.

stages of the eval graph -> axes.py, study.py: which sizes may vary, and what follows them
                         -> stage.py: torch.export, then torch's ONNX exporter
                         -> names.py: the model's own names
                         -> verify.py: onnxruntime against the model
                         -> folder.py: moved into place
"""

from .export import export_chain

__all__ = ["export_chain"]
