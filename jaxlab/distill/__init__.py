"""Passing on what one network knows to another.

Start with `distillation_loss`: a student fits its teacher's softened predictions and the labels.
"""

from jaxlab.distill.class_relation import (
    class_relation_loss,
    discovery_targets,
    normalize_prototypes,
    swapped_prediction_loss,
)
from jaxlab.distill.deep_incubation import deep_incubation, interface_gap, stage_network
from jaxlab.distill.distiller import (
    PipelineRecommender,
    bilinear_critic,
    distiller_loss,
    emd_layer_weights,
    fit_recommender,
    gaussian_information_loss,
    layer_weights,
    mi_alpha_bound,
    mi_alpha_loss,
    mixup,
    recommend_pipeline,
)
from jaxlab.distill.knowledge import distillation_loss, feature_loss
from jaxlab.distill.leaf import (
    confounding_mask,
    leaf_loss,
    mask_runs,
    prune_tokens,
    token_distillation_loss,
    token_gradient_norms,
)
from jaxlab.distill.mcmi import (
    class_centroids,
    conditional_mutual_information,
    few_shot_subset,
    mcmi_loss,
    update_centroids,
)
from jaxlab.distill.nrr_dd import (
    class_activation_map,
    compose_grid,
    cutmix,
    distance_loss,
    label_distances,
    refine_non_critical,
    select_patches,
    statistics_loss,
)
from jaxlab.distill.quantized_distillation import (
    allocate_points,
    compressed_bits,
    differentiable_quantization,
    point_quantize,
    quantile_points,
    quantized_distillation,
    uniform_quantize,
)
from jaxlab.distill.token_relation import match_grid, relation_matrix, token_relation_loss

__all__ = [
    "PipelineRecommender",
    "allocate_points",
    "bilinear_critic",
    "class_activation_map",
    "class_centroids",
    "class_relation_loss",
    "compose_grid",
    "compressed_bits",
    "conditional_mutual_information",
    "confounding_mask",
    "cutmix",
    "deep_incubation",
    "differentiable_quantization",
    "discovery_targets",
    "distance_loss",
    "distillation_loss",
    "distiller_loss",
    "emd_layer_weights",
    "feature_loss",
    "few_shot_subset",
    "fit_recommender",
    "gaussian_information_loss",
    "interface_gap",
    "label_distances",
    "layer_weights",
    "leaf_loss",
    "mask_runs",
    "match_grid",
    "mcmi_loss",
    "mi_alpha_bound",
    "mi_alpha_loss",
    "mixup",
    "normalize_prototypes",
    "point_quantize",
    "prune_tokens",
    "quantile_points",
    "quantized_distillation",
    "recommend_pipeline",
    "refine_non_critical",
    "relation_matrix",
    "select_patches",
    "stage_network",
    "statistics_loss",
    "swapped_prediction_loss",
    "token_distillation_loss",
    "token_gradient_norms",
    "token_relation_loss",
    "uniform_quantize",
    "update_centroids",
]
