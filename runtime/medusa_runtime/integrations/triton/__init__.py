"""Triton Inference Server: a model of its Python backend over a bundle.

The repository that ``medusa-export triton`` writes imports ``TritonPythonModel`` from here.
"""

from medusa_runtime.integrations.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
