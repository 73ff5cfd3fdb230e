"""Tables of probes and baselines from recipes: fitted, tested once, compared, and written."""
