"""Normalisation of activations and weights.

Start with `layer_norm` (the same in training and test, any batch size) or, a little cheaper, `rms_norm`. `batch_norm`
needs a batch of at least some dozens and carries running statistics. `weight_norm` normalises the weights instead.
`ln_rnn_cell`, `ln_lstm_cell` and `ln_gru_cell` are recurrent cells with layer normalisation inside. Where training goes
on while the task changes, put `normalize_and_project` behind the optimiser of a network that normalises before every
activation (`normalized_mlp` is one): the weights keep their length and with it the rate at which they learn.
"""

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

__all__ = [
    "batch_norm",
    "dormant_fraction",
    "effective_learning_rate",
    "layer_norm",
    "ln_gru_cell",
    "ln_lstm_cell",
    "ln_rnn_cell",
    "normalize_and_project",
    "normalized_mlp",
    "project",
    "project_scale_offset",
    "record_norms",
    "rms_norm",
    "scale_by_norm_growth",
    "weight_norm",
]
