"""Benchmarks: ratios inside one run, against the ceiling, the naive form and the peer; never a lone millisecond."""
