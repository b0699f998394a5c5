"""Passing on what one network knows to another.

Start with `distillation_loss`: a student fits its teacher's softened predictions and the labels.
"""

from jaxlab.distill.knowledge import distillation_loss, feature_loss
from jaxlab.distill.token_relation import match_grid, relation_matrix, token_relation_loss

__all__ = ["distillation_loss", "feature_loss", "match_grid", "relation_matrix", "token_relation_loss"]
