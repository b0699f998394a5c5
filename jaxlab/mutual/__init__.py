"""Networks that teach each other.

Start with `deep_mutual_learning`: K networks, each learning from the labels and from the others' predictions.
"""

from jaxlab.mutual.attentive_waveblock import (
    cbam,
    cluster_pseudo_labels,
    complementarity,
    mutual_mean_teaching,
    nonlocal_block,
    soft_triplet_loss,
    waveblock,
)
from jaxlab.mutual.comd import (
    balance_pool,
    comd,
    comd_losses,
    comd_round,
    competitive_targets,
    debiased_gap,
    remove_duplicates,
    split_by_gap,
)
from jaxlab.mutual.counter_current import (
    counter_current,
    counter_current_alignment,
    counter_current_level_loss,
    counter_current_loss,
    counter_current_net,
    counter_current_sgd,
)
from jaxlab.mutual.deep_mutual_learning import deep_mutual_learning, mutual_kl, mutual_objective
from jaxlab.mutual.gl_dmnet import (
    cascade_decoder,
    channel_mutual_fusion,
    e_measure,
    gl_dmnet,
    max_f_beta,
    position_mutual_fusion,
    s_measure,
    saliency_loss,
    saliency_mae,
    soft_iou,
)
from jaxlab.mutual.mean_teacher import MeanTeacherState, consistency_loss, mean_teacher, ramp_up
from jaxlab.mutual.peers import peers
from jaxlab.mutual.queaco import (
    QueacoState,
    bio_spans,
    feedback_product,
    normalize_values,
    queaco,
    refine_weak_labels,
    span_f1,
    value_probabilities,
)

__all__ = [
    "MeanTeacherState",
    "QueacoState",
    "balance_pool",
    "bio_spans",
    "cascade_decoder",
    "cbam",
    "channel_mutual_fusion",
    "cluster_pseudo_labels",
    "comd",
    "comd_losses",
    "comd_round",
    "competitive_targets",
    "complementarity",
    "consistency_loss",
    "counter_current",
    "counter_current_alignment",
    "counter_current_level_loss",
    "counter_current_loss",
    "counter_current_net",
    "counter_current_sgd",
    "debiased_gap",
    "deep_mutual_learning",
    "e_measure",
    "feedback_product",
    "gl_dmnet",
    "max_f_beta",
    "mean_teacher",
    "mutual_kl",
    "mutual_mean_teaching",
    "mutual_objective",
    "nonlocal_block",
    "normalize_values",
    "peers",
    "position_mutual_fusion",
    "queaco",
    "ramp_up",
    "refine_weak_labels",
    "remove_duplicates",
    "s_measure",
    "saliency_loss",
    "saliency_mae",
    "soft_iou",
    "soft_triplet_loss",
    "span_f1",
    "split_by_gap",
    "value_probabilities",
    "waveblock",
]
