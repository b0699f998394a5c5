"""Passing on what one network knows to another.

Start with `distillation_loss`: a student fits its teacher's softened predictions and the labels.
"""

from jaxlab.distill.knowledge import distillation_loss, feature_loss

__all__ = ["distillation_loss", "feature_loss"]
