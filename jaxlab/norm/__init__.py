"""Normalisation of activations and weights.

Start with `layer_norm` (the same in training and test, any batch size) or, a little cheaper, `rms_norm`. `batch_norm`
needs a batch of at least some dozens and carries running statistics. `weight_norm` normalises the weights instead.
`ln_rnn_cell`, `ln_lstm_cell` and `ln_gru_cell` are recurrent cells with layer normalisation inside.
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

__all__ = ["batch_norm", "layer_norm", "ln_gru_cell", "ln_lstm_cell", "ln_rnn_cell", "rms_norm", "weight_norm"]
