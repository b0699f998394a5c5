"""What runs: data sources, mesh, checkpoints, the training loop, logs, plots and recipes."""
