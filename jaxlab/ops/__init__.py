"""What more than one paper needs: masked reductions, collectives, sharding, sorting, transport, tree arithmetic."""

from jaxlab.ops.assignment import linear_assignment
from jaxlab.ops.chunks import map_rows
from jaxlab.ops.clustering import kmeans
from jaxlab.ops.collectives import (
    all_mean,
    all_sum,
    axis_index,
    axis_size,
    gather_rows,
    global_mean,
    match_varying,
    value_and_grad,
)
from jaxlab.ops.masked import (
    compute_dtype,
    masked_logsumexp,
    masked_mean,
    masked_softmax,
    masked_sum,
    safe_divide,
    safe_normalize,
    zero_where_false,
)
from jaxlab.ops.neighbours import weighted_knn
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.ops.soft_trees import smooth_step, soft_tree_leaves, soft_tree_tables
from jaxlab.ops.sorting import odd_even_sort
from jaxlab.ops.transport import gumbel_sinkhorn, sinkhorn
from jaxlab.ops.trees import ema_update, tree_lerp, tree_norm

__all__ = [
    "all_mean",
    "all_sum",
    "axis_index",
    "axis_size",
    "compute_dtype",
    "ema_update",
    "gather_rows",
    "global_mean",
    "gumbel_sinkhorn",
    "kmeans",
    "linear_assignment",
    "map_rows",
    "masked_logsumexp",
    "masked_mean",
    "masked_softmax",
    "masked_sum",
    "match_varying",
    "odd_even_sort",
    "reduce_terms",
    "rows_mixed",
    "safe_divide",
    "safe_normalize",
    "sinkhorn",
    "smooth_step",
    "soft_tree_leaves",
    "soft_tree_tables",
    "tree_lerp",
    "tree_norm",
    "value_and_grad",
    "weighted_knn",
    "zero_where_false",
]
