"""Multiple-instance learning: one label for a bag of instances.

Bags come padded (`x [B, N, D]`, `where [B, N]`) or ragged (`x [T, D]`, `segment_ids [T]`, `num_segments`); both give
the same numbers. Start with `abmil`, inside `with_encoder` if the features are raw, and `bag_auc`. Where a bag must be
positive exactly if one of its instances is, `mi_net` cannot learn anything else.
"""

from jaxlab.mil.aggregate_responses import (
    bag_loss,
    bag_risk,
    dp_aggregate,
    instance_loss,
    interpolated_loss,
    linear_interpolated_estimator,
    optimal_bag_size,
    population_shrinkage,
    random_bags,
    within_bag_variance,
)
from jaxlab.mil.metrics import bag_auc
from jaxlab.mil.mhim import (
    bag_consistency_loss,
    ham_ratio_schedule,
    hard_instance_mask,
    mhim,
    mhim_loss,
    select_mask,
)
from jaxlab.mil.mhim_v2 import (
    class_aware_score,
    class_aware_score_multihead,
    global_recycling,
    mhim_v2,
    mhim_v2_loss,
    recycle_split,
    update_query,
)
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
    "bag_consistency_loss",
    "bag_loss",
    "bag_risk",
    "class_aware_score",
    "class_aware_score_multihead",
    "dp_aggregate",
    "dsmil",
    "global_recycling",
    "gnn_mil",
    "ham_ratio_schedule",
    "hard_instance_mask",
    "hopfield_mil",
    "instance_encoder",
    "instance_loss",
    "interpolated_loss",
    "linear_interpolated_estimator",
    "make_false_frequency",
    "make_multi_concept",
    "make_single_concept",
    "max_mil",
    "max_pool",
    "mean_mil",
    "mean_pool",
    "mhim",
    "mhim_loss",
    "mhim_v2",
    "mhim_v2_loss",
    "mi_net",
    "mi_net_multi",
    "monotonicity_violation",
    "optimal_bag_size",
    "population_shrinkage",
    "random_bags",
    "recycle_split",
    "run_unit_test",
    "select_mask",
    "transmil",
    "update_query",
    "with_encoder",
    "within_bag_variance",
]
