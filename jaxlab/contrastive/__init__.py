"""Losses that pull views of one example together and push other examples away.

Start with `info_nce_loss` (two views, one direction) or `nt_xent_loss` (SimCLR: any number of views, all directions).
`groco_multiview_loss` orders positives before the hardest negatives instead of a softmax over all of them: try it where
nearest neighbours are what you use the embeddings for; `groco_loss` is the same with positives and negatives of your
own. `hard_contrastive_loss` keeps only the hardest negatives in the softmax, and `uniformity`, `tolerance` and
`alignment` tell what the temperature does to the embeddings. `matryoshka_loss` and `matryoshka_contrastive_loss` make
every prefix of an embedding a good one, for `adaptive_classify` and `funnel_search`. All losses take `axis_name` and
then use the negatives of all devices.

`mmcr_loss` compares no pairs: it spreads the mean of each image's views over many directions, at a cost linear in the
number of views; `manifold_statistics` and `effective_rank` show how far that went. `pair_contrastive_loss` makes
samples of any two classes positive, in the dimensions that a `pair_gate` leaves open to them.

With labels: `supervised_contrastive_loss`, and `sbcl_loss` where some classes are much larger than others. With a graph
of images: `transitive_pairs` joins what its edges imply, and `batch_hard_triplet_loss` learns from any pairs. With
people to ask: `similarity_query_loss` learns from which two of three they find most alike.

`tell` clusters while it learns to reconstruct; its layer's weights are the centres.
"""

from jaxlab.contrastive.groco import groco_loss, groco_multiview_loss
from jaxlab.contrastive.hard_contrastive import (
    alignment,
    hard_contrastive_loss,
    penalty_entropy,
    relative_penalty,
    simple_contrastive_loss,
    tolerance,
    uniformity,
)
from jaxlab.contrastive.hydra import (
    class_relations,
    filtered_similarity,
    gate_entropy,
    pair_contrastive_loss,
    pair_gate,
    sample_partners,
)
from jaxlab.contrastive.info_nce import info_nce_loss, nt_xent_loss
from jaxlab.contrastive.matryoshka_representation import (
    adaptive_classify,
    funnel_search,
    matryoshka_contrastive_loss,
    matryoshka_head,
    matryoshka_loss,
    mean_average_precision,
    nesting_dims,
    prefix_search,
    retrieval_cost,
    tune_thresholds,
)
from jaxlab.contrastive.mmcr import effective_rank, manifold_statistics, mmcr_loss, nuclear_norm
from jaxlab.contrastive.sbcl import (
    assign_subclasses,
    balanced_kmeans,
    class_temperatures,
    ldam_loss,
    long_tail_indices,
    sbcl_loss,
    subclass_counts,
)
from jaxlab.contrastive.sirl import (
    euclidean_triplet_loss,
    feature_prediction_error,
    odd_one_out,
    preference_accuracy,
    preference_loss,
    similarity_query_loss,
)
from jaxlab.contrastive.supervised import supervised_contrastive_loss
from jaxlab.contrastive.tell import (
    adjusted_rand_index,
    centres_to_layer,
    layer_to_centres,
    tell,
    tell_assign,
    tell_cluster_loss,
    tell_fit,
    tell_kmeans_loss,
)
from jaxlab.contrastive.transitive_invariance import (
    batch_hard_triplet_loss,
    cosine_triplet_loss,
    neighbour_edges,
    sample_triplets,
    transitive_pair_list,
    transitive_pairs,
)

__all__ = [
    "adaptive_classify",
    "adjusted_rand_index",
    "alignment",
    "assign_subclasses",
    "balanced_kmeans",
    "batch_hard_triplet_loss",
    "centres_to_layer",
    "class_relations",
    "class_temperatures",
    "cosine_triplet_loss",
    "effective_rank",
    "euclidean_triplet_loss",
    "feature_prediction_error",
    "filtered_similarity",
    "funnel_search",
    "gate_entropy",
    "groco_loss",
    "groco_multiview_loss",
    "hard_contrastive_loss",
    "info_nce_loss",
    "layer_to_centres",
    "ldam_loss",
    "long_tail_indices",
    "manifold_statistics",
    "matryoshka_contrastive_loss",
    "matryoshka_head",
    "matryoshka_loss",
    "mean_average_precision",
    "mmcr_loss",
    "neighbour_edges",
    "nesting_dims",
    "nt_xent_loss",
    "nuclear_norm",
    "odd_one_out",
    "pair_contrastive_loss",
    "pair_gate",
    "penalty_entropy",
    "preference_accuracy",
    "preference_loss",
    "prefix_search",
    "relative_penalty",
    "retrieval_cost",
    "sample_partners",
    "sample_triplets",
    "sbcl_loss",
    "similarity_query_loss",
    "simple_contrastive_loss",
    "subclass_counts",
    "supervised_contrastive_loss",
    "tell",
    "tell_assign",
    "tell_cluster_loss",
    "tell_fit",
    "tell_kmeans_loss",
    "tolerance",
    "transitive_pair_list",
    "transitive_pairs",
    "tune_thresholds",
    "uniformity",
]
