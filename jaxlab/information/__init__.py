"""Mutual information: estimators, bounds and objectives built on them.

Every bound takes a critic's scores of all pairs in a batch. Train with `info_nce_bound` (small variance, at most log N)
or `jensen_shannon_bound` (stable, no estimate itself), and report with `smile_estimate`; `donsker_varadhan_bound` and
`nwj_bound` are for large batches. Without a critic: `ksg_information` (neighbours), `cs_mutual_information` (kernels),
`mist` (a network trained once). `gaussian_mutual_information` and `sample_information_task` are truths to test against.
`wpc_loss` is InfoNCE with a critic held to be 1-Lipschitz: take it where encoders are to keep many factors and batches
are small. `cs_ib_loss` is the bottleneck for regression. `mcr_loss` trains several modalities without one outrunning
the others, `m3i_loss` on several targets at once. `cmim_loss` is an auto-encoder whose codes serve linear readers,
`ridge_probe` or `logistic_probe`. `mlc_loss` clusters and makes clusters linear by `coding_rate`.
"""

from jaxlab.information.bounds import (
    donsker_varadhan_bound,
    gaussian_mutual_information,
    info_nce_bound,
    jensen_shannon_bound,
    nwj_bound,
    smile_estimate,
)
from jaxlab.information.cmim import (
    cmim_contrastive_loss,
    cmim_loss,
    draw_codes,
    gaussian_log_density,
    informative_embedding,
    mim_loss,
    pool_hidden,
)
from jaxlab.information.cmim_embeddings import batch_size_sensitivity, contrastive_weights
from jaxlab.information.cs_ib import (
    conditional_cs_divergence,
    cs_divergence,
    cs_ib_loss,
    cs_ib_network,
    cs_mutual_information,
    fgsm,
    median_bandwidth,
    pgd,
)
from jaxlab.information.m3i import TargetSpec, log_likelihood, m3i_loss, patch_mix, special_case
from jaxlab.information.manifold_clustering import mlc_loss, mlc_membership, spectral_clustering
from jaxlab.information.mi_benchmarks import (
    additive_noise_information,
    covariance_information,
    ksg_information,
    monotone_map,
    sample_information_task,
)
from jaxlab.information.mist import bootstrap_interval, mist, mist_interval, mist_loss
from jaxlab.information.multimodal_competition import (
    competition_loss,
    jensen_shannon_divergence,
    label_contrastive_loss,
    mcr_loss,
    modality_contributions,
    ogm_coefficients,
)
from jaxlab.information.probes import logistic_probe, ridge_probe
from jaxlab.information.rate_reduction import (
    class_coding_rate,
    coding_length,
    coding_rate,
    rate_reduction_loss,
    total_coding_rate_loss,
)
from jaxlab.information.wasserstein_dependency import (
    gradient_penalty,
    wasserstein_dependency,
    wasserstein_dual_bound,
    wpc_loss,
)

__all__ = [
    "TargetSpec",
    "additive_noise_information",
    "batch_size_sensitivity",
    "bootstrap_interval",
    "class_coding_rate",
    "cmim_contrastive_loss",
    "cmim_loss",
    "coding_length",
    "coding_rate",
    "competition_loss",
    "conditional_cs_divergence",
    "contrastive_weights",
    "covariance_information",
    "cs_divergence",
    "cs_ib_loss",
    "cs_ib_network",
    "cs_mutual_information",
    "donsker_varadhan_bound",
    "draw_codes",
    "fgsm",
    "gaussian_log_density",
    "gaussian_mutual_information",
    "gradient_penalty",
    "info_nce_bound",
    "informative_embedding",
    "jensen_shannon_bound",
    "jensen_shannon_divergence",
    "ksg_information",
    "label_contrastive_loss",
    "log_likelihood",
    "logistic_probe",
    "m3i_loss",
    "mcr_loss",
    "median_bandwidth",
    "mim_loss",
    "mist",
    "mist_interval",
    "mist_loss",
    "mlc_loss",
    "mlc_membership",
    "modality_contributions",
    "monotone_map",
    "nwj_bound",
    "ogm_coefficients",
    "patch_mix",
    "pgd",
    "pool_hidden",
    "rate_reduction_loss",
    "ridge_probe",
    "sample_information_task",
    "smile_estimate",
    "special_case",
    "spectral_clustering",
    "total_coding_rate_loss",
    "wasserstein_dependency",
    "wasserstein_dual_bound",
    "wpc_loss",
]
