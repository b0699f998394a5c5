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

Where a stronger model can judge candidates, `mine_hard_negatives` chooses among them by its scores and
`judge_alignment_loss` teaches the embeddings these scores; `pairwise_rerank_loss` and `listwise_rerank_loss` train a
reranker on the same candidates.

`saha_clusters` makes batches of pairs that the model itself finds hard for each other, and `cluster_info_nce_loss`
trains on them.

`cm3` and `cm3_loss` recommend items from interactions and from several modalities of features, `interaction_graph`
prepares these, and `recall_and_ndcg` measures a ranking.

`swav_loss` predicts a balanced assignment of one crop to prototypes from the other crops; `group_gaps` and its
companions compare features between groups of people and places.

`gedi_loss` clusters and models the density with one network; `langevin` draws its samples.

`aggregate_by_similarity` and `snippet_reconstruction_loss` reconstruct a snippet of a time series from others.
"""

from jaxlab.contrastive.cm3 import (
    InteractionGraph,
    calibrated_uniformity,
    cm3,
    cm3_loss,
    interaction_graph,
    recall_and_ndcg,
    spherical_bezier,
)
from jaxlab.contrastive.gedi import clustering_scores, draw_from_buffer, energy, gedi_loss, langevin, sum_log_likelihood
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
from jaxlab.contrastive.saha import (
    cluster_info_nce_loss,
    false_negative_rate,
    hierarchical_prompt,
    last_token_pool,
    saha_clusters,
)
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
from jaxlab.contrastive.snippet_reconstruction import (
    aggregate_by_similarity,
    bilstm,
    geometric_mask,
    masked_views,
    snippet_reconstruction_loss,
    uncertainty_weighted_sum,
)
from jaxlab.contrastive.supervised import supervised_contrastive_loss
from jaxlab.contrastive.swav_fairness import (
    effective_robustness,
    group_gaps,
    harmful_association_rate,
    hit_at_k,
    regnet_widths,
    same_attribute_precision,
    sinkhorn_codes,
    swav_loss,
)
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
from jaxlab.contrastive.unime_v2 import (
    judge_alignment_loss,
    judge_scores,
    listwise_rerank_loss,
    mine_hard_negatives,
    pairwise_rerank_loss,
)

__all__ = [
    "InteractionGraph",
    "adaptive_classify",
    "adjusted_rand_index",
    "aggregate_by_similarity",
    "alignment",
    "assign_subclasses",
    "balanced_kmeans",
    "batch_hard_triplet_loss",
    "bilstm",
    "calibrated_uniformity",
    "centres_to_layer",
    "class_relations",
    "class_temperatures",
    "cluster_info_nce_loss",
    "clustering_scores",
    "cm3",
    "cm3_loss",
    "cosine_triplet_loss",
    "draw_from_buffer",
    "effective_rank",
    "effective_robustness",
    "energy",
    "euclidean_triplet_loss",
    "false_negative_rate",
    "feature_prediction_error",
    "filtered_similarity",
    "funnel_search",
    "gate_entropy",
    "gedi_loss",
    "geometric_mask",
    "groco_loss",
    "groco_multiview_loss",
    "group_gaps",
    "hard_contrastive_loss",
    "harmful_association_rate",
    "hierarchical_prompt",
    "hit_at_k",
    "info_nce_loss",
    "interaction_graph",
    "judge_alignment_loss",
    "judge_scores",
    "langevin",
    "last_token_pool",
    "layer_to_centres",
    "ldam_loss",
    "listwise_rerank_loss",
    "long_tail_indices",
    "manifold_statistics",
    "masked_views",
    "matryoshka_contrastive_loss",
    "matryoshka_head",
    "matryoshka_loss",
    "mean_average_precision",
    "mine_hard_negatives",
    "mmcr_loss",
    "neighbour_edges",
    "nesting_dims",
    "nt_xent_loss",
    "nuclear_norm",
    "odd_one_out",
    "pair_contrastive_loss",
    "pair_gate",
    "pairwise_rerank_loss",
    "penalty_entropy",
    "preference_accuracy",
    "preference_loss",
    "prefix_search",
    "recall_and_ndcg",
    "regnet_widths",
    "relative_penalty",
    "retrieval_cost",
    "saha_clusters",
    "same_attribute_precision",
    "sample_partners",
    "sample_triplets",
    "sbcl_loss",
    "similarity_query_loss",
    "simple_contrastive_loss",
    "sinkhorn_codes",
    "snippet_reconstruction_loss",
    "spherical_bezier",
    "subclass_counts",
    "sum_log_likelihood",
    "supervised_contrastive_loss",
    "swav_loss",
    "tell",
    "tell_assign",
    "tell_cluster_loss",
    "tell_fit",
    "tell_kmeans_loss",
    "tolerance",
    "transitive_pair_list",
    "transitive_pairs",
    "tune_thresholds",
    "uncertainty_weighted_sum",
    "uniformity",
]
