"""Tables of probes and baselines, made from recipes: fitted, tested once, compared, written."""
