"""Multiple-instance learning: one label for a bag of instances.

Bags come padded (`x [B, N, D]`, `where [B, N]`) or ragged (`x [T, D]`, `segment_ids [T]`, `num_segments`); every bag
model takes both and gives the same numbers. Padding changes nothing, wherever it stands. The order of the instances
never matters, except to `r2t` and `mamba_mil`, for which it is the place on the slide. An empty bag has the pooled
vector 0, hence the head's bias as logits (`transmil`: what the class token alone gives). `ins` classifies instances:
`max_pool` of its probabilities scores bags, in either layout.

Start with `abmil`, inside `with_encoder` if the features are raw, and `bag_auc`; a list of bags of very different sizes
needs memory for its instances alone (`jaxlab bench mil`). `jaxlab train mil --model NAME` trains any of them on bags of
real pictures and draws what it attends to.

Who respects the assumption that a bag is positive because of what it holds? Mean AUC on the test bags of the three
algorithmic unit tests (`mil_unit_tests`), as its claim recorded it: below 0.5 a model has learnt the reverse, 0.5 is a
task that it cannot express. Models without "yes" can be wrong in a way that training bags do not show. The first seven
rows are means of five seeds, the others rest on one.

| model | single concept | multi concept | false frequency | respects the assumption |
| --- | ---: | ---: | ---: | --- |
| mi-Net | 0.92 | 0.69 | 0.50 | yes |
| product of concepts | 0.97 | 0.85 | 0.52 | yes |
| MI-Net | 0.00 | 0.00 | 0.97 | no |
| ABMIL | 0.00 | 0.00 | 0.12 | no |
| TransMIL | 0.00 | 0.00 | 0.00 | no |
| GNN-MIL | 0.00 | 0.30 | 0.00 | no |
| Hopfield | 0.28 | 0.17 | 0.40 | no |
| least of concepts | 0.92 | 0.78 | 0.49 | yes |
| mean | 0.00 | 0.15 | 0.01 | no |
| gated ABMIL | 0.00 | 0.00 | 0.48 | no |
| DSMIL | 0.03 | 0.00 | 1.00 | no |
| Deep Sets | 0.00 | 0.04 | 0.01 | no |
| R2T, ABMIL | 0.00 | 0.00 | 0.00 | no |
| MambaMIL | 0.00 | 0.00 | 0.47 | no |
| MHIM-MIL, ABMIL | 0.70 | 0.42 | 0.17 | no |
| MHIM v2, ABMIL | 0.83 | 0.49 | 0.51 | yes |
| INS | 0.93 | 0.82 | 0.46 | yes |
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
