"""The executable claim of each paper: `jaxlab/claims/<family>/<key>.py` with one `claim()`, and its recorded result."""
