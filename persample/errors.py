"""Errors: each says what was received, what is allowed and what to do."""

from __future__ import annotations


class PerSampleError(RuntimeError):
    """Base of the library's own errors."""


class CoupledSamplesError(PerSampleError):
    """Samples of the batch influence each other, so that no sample has a gradient of its own."""


class UnsupportedError(PerSampleError):
    """The chosen backend does not cover something in the model; the message names it."""


class CheckError(PerSampleError):
    """Per-sample gradients do not add up to the batch gradient: the result would have been wrong."""
