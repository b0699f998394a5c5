"""Mutual information: estimators, bounds and objectives built on them.

Every bound takes a critic's scores of all pairs in a batch. Train with `info_nce_bound` (small variance, at most log N)
or `jensen_shannon_bound` (stable, no estimate itself), and report with `smile_estimate`; `donsker_varadhan_bound` and
`nwj_bound` are for large batches. `gaussian_mutual_information` is the truth to test an estimator against.
"""

from jaxlab.information.bounds import (
    donsker_varadhan_bound,
    gaussian_mutual_information,
    info_nce_bound,
    jensen_shannon_bound,
    nwj_bound,
    smile_estimate,
)

__all__ = [
    "donsker_varadhan_bound",
    "gaussian_mutual_information",
    "info_nce_bound",
    "jensen_shannon_bound",
    "nwj_bound",
    "smile_estimate",
]
