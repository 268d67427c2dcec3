"""Why a model folder cannot be served."""

from __future__ import annotations


class ModelFolderError(RuntimeError):
    """The folder lacks a file, holds other tensors than the model has, or asks for what this scorer does not compute."""
