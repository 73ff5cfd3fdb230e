"""One probe and its file; many probes as one projection, and why a logit is what it is."""
