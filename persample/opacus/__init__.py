"""Opacus with these gradients: its privacy engine, samplers, noise and accountants train any model that is exact here.

Needs the Opacus library (`pip install 'opacus>=1.5'`), and is imported by its own name alone.
"""

from persample.opacus.grad_sample_module import GradSampleModule

__all__ = ["GradSampleModule"]
