"""Mutual information: estimators, bounds and objectives built on them.

Every bound takes a critic's scores of all pairs in a batch. Train with `info_nce_bound` (small variance, at most log N)
or `jensen_shannon_bound` (stable, no estimate itself), and report with `smile_estimate`; `donsker_varadhan_bound` and
`nwj_bound` are for large batches. `wpc_loss` is InfoNCE with a critic held to be 1-Lipschitz: take it where encoders
are to keep many factors and batches are small.
"""

from jaxlab.information.bounds import (
    donsker_varadhan_bound,
    gaussian_mutual_information,
    info_nce_bound,
    jensen_shannon_bound,
    nwj_bound,
    smile_estimate,
)
from jaxlab.information.probes import logistic_probe, ridge_probe
from jaxlab.information.wasserstein_dependency import (
    gradient_penalty,
    wasserstein_dependency,
    wasserstein_dual_bound,
    wpc_loss,
)

__all__ = [
    "donsker_varadhan_bound",
    "gaussian_mutual_information",
    "gradient_penalty",
    "info_nce_bound",
    "jensen_shannon_bound",
    "logistic_probe",
    "nwj_bound",
    "ridge_probe",
    "smile_estimate",
    "wasserstein_dependency",
    "wasserstein_dual_bound",
    "wpc_loss",
]
