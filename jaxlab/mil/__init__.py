"""Multiple-instance learning: one label for a bag of instances.

Bags come padded (`x [B, N, D]`, `where [B, N]`) or ragged (`x [T, D]`, `segment_ids [T]`, `num_segments`); every bag
model takes both and gives the same numbers. Padding changes nothing, wherever it stands. The order of the instances
never matters, except to `r2t` and `mamba_mil`, for which it is the place on the slide. An empty bag has the pooled
vector 0, hence the head's bias as logits (`transmil`: what the class token alone gives). `ins` classifies instances:
`max_pool` of its probabilities scores bags, in either layout.

Start with `abmil`, inside `with_encoder` if the features are raw, and `bag_auc`; a list of bags of very different sizes
needs memory for its instances alone (`jaxlab bench mil`). `jaxlab train mil --model NAME` trains any of them on bags of
real pictures and draws what it attends to.
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
from jaxlab.mil.facile import (
    deepsets,
    evaluate_few_shot,
    facile_loss,
    few_shot_episode,
    few_shot_logits,
    make_sets,
    rate_slope,
    set_supcon_loss,
)
from jaxlab.mil.ins import (
    confidence_update,
    ins,
    moco_loss,
    partial_labels,
    partial_supcon_loss,
    phi_schedule,
    prototype_update,
)
from jaxlab.mil.mamba_mil import (
    inverse_reorder,
    mamba_mil,
    nll_survival_loss,
    reorder,
    sr_mamba,
    survival_outputs,
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
from jaxlab.mil.r2t import (
    r2t,
    region_partition,
    region_reverse,
)

__all__ = [
    "abmil",
    "attention_pool",
    "bag_auc",
    "bag_consistency_loss",
    "bag_loss",
    "bag_risk",
    "class_aware_score",
    "class_aware_score_multihead",
    "confidence_update",
    "deepsets",
    "dp_aggregate",
    "dsmil",
    "evaluate_few_shot",
    "facile_loss",
    "few_shot_episode",
    "few_shot_logits",
    "global_recycling",
    "gnn_mil",
    "ham_ratio_schedule",
    "hard_instance_mask",
    "hopfield_mil",
    "ins",
    "instance_encoder",
    "instance_loss",
    "interpolated_loss",
    "inverse_reorder",
    "linear_interpolated_estimator",
    "make_false_frequency",
    "make_multi_concept",
    "make_sets",
    "make_single_concept",
    "mamba_mil",
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
    "moco_loss",
    "monotonicity_violation",
    "nll_survival_loss",
    "optimal_bag_size",
    "partial_labels",
    "partial_supcon_loss",
    "phi_schedule",
    "population_shrinkage",
    "prototype_update",
    "r2t",
    "random_bags",
    "rate_slope",
    "recycle_split",
    "region_partition",
    "region_reverse",
    "reorder",
    "run_unit_test",
    "select_mask",
    "set_supcon_loss",
    "sr_mamba",
    "survival_outputs",
    "transmil",
    "update_query",
    "with_encoder",
    "within_bag_variance",
]
