"""Multiple-instance learning: one label for a bag of instances.

Bags come padded (`x [B, N, D]`, `where [B, N]`) or ragged (`x [T, D]`, `segment_ids [T]`, `num_segments`); both give
the same numbers. Start with `abmil`, inside `with_encoder` if the features are raw, and `bag_auc`. Where a bag must be
positive exactly if one of its instances is, `mi_net` cannot learn anything else.
"""

from jaxlab.mil.metrics import bag_auc
from jaxlab.mil.mil_unit_tests import (
    gnn_mil,
    make_false_frequency,
    make_multi_concept,
    make_single_concept,
    mi_net_multi,
    monotonicity_violation,
    run_unit_test,
)
from jaxlab.mil.models import (
    abmil,
    dsmil,
    hopfield_mil,
    instance_encoder,
    max_mil,
    mean_mil,
    mi_net,
    transmil,
    with_encoder,
)
from jaxlab.mil.pooling import attention_pool, max_pool, mean_pool

__all__ = [
    "abmil",
    "attention_pool",
    "bag_auc",
    "dsmil",
    "gnn_mil",
    "hopfield_mil",
    "instance_encoder",
    "make_false_frequency",
    "make_multi_concept",
    "make_single_concept",
    "max_mil",
    "max_pool",
    "mean_mil",
    "mean_pool",
    "mi_net",
    "mi_net_multi",
    "monotonicity_violation",
    "run_unit_test",
    "transmil",
    "with_encoder",
]
