"""Normalisation of activations and weights.

Start with `layer_norm` (the same in training and test, any batch size) or, a little cheaper, `rms_norm`. `batch_norm`
needs a batch of at least some dozens and carries running statistics; `power_norm` is one for transformers, whose
backward pass needs `absorb_nu` after every step. `instance_batch_norm` (half instance, half batch normalisation) in the
shallow layers of an image network, as in `ibn_net`, helps with images of another appearance. `weight_norm` normalises
the weights instead. `ln_rnn_cell`, `ln_lstm_cell` and `ln_gru_cell` are recurrent cells with layer normalisation
inside. Where training goes on while the task changes, put `normalize_and_project` behind the optimiser of a network
that normalises before every activation (`normalized_mlp` is one): the weights keep their length and with it the rate
at which they learn.

For covariance matrices there are `spd_batch_norm` and the layers around it (`bimap`, `reeig`, `spd_log`), trained with
`riemannian_sgd`, and the geometry under them (`bw_...`).
"""

from jaxlab.norm.ibn_net import (
    feature_divergence,
    ibn_block,
    ibn_net,
    instance_batch_norm,
    instance_norm,
)
from jaxlab.norm.layer_norm import (
    batch_norm,
    layer_norm,
    ln_gru_cell,
    ln_lstm_cell,
    ln_rnn_cell,
    rms_norm,
    weight_norm,
)
from jaxlab.norm.normalize_and_project import (
    dormant_fraction,
    effective_learning_rate,
    normalize_and_project,
    normalized_mlp,
    project,
    project_scale_offset,
    record_norms,
    scale_by_norm_growth,
)
from jaxlab.norm.power_norm import (
    absorb_nu,
    batch_statistic_distance,
    group_scaling,
    power_norm,
    power_norm_v,
)
from jaxlab.norm.spd_bures_wasserstein import (
    bimap,
    bw_barycenter,
    bw_exp,
    bw_geodesic,
    bw_log,
    bw_squared_distance,
    lyapunov,
    reeig,
    riemannian_sgd,
    spd_batch_norm,
    spd_function,
    spd_log,
    spd_power,
)

__all__ = [
    "absorb_nu",
    "batch_norm",
    "batch_statistic_distance",
    "bimap",
    "bw_barycenter",
    "bw_exp",
    "bw_geodesic",
    "bw_log",
    "bw_squared_distance",
    "dormant_fraction",
    "effective_learning_rate",
    "feature_divergence",
    "group_scaling",
    "ibn_block",
    "ibn_net",
    "instance_batch_norm",
    "instance_norm",
    "layer_norm",
    "ln_gru_cell",
    "ln_lstm_cell",
    "ln_rnn_cell",
    "lyapunov",
    "normalize_and_project",
    "normalized_mlp",
    "power_norm",
    "power_norm_v",
    "project",
    "project_scale_offset",
    "record_norms",
    "reeig",
    "riemannian_sgd",
    "rms_norm",
    "scale_by_norm_growth",
    "spd_batch_norm",
    "spd_function",
    "spd_log",
    "spd_power",
    "weight_norm",
]
