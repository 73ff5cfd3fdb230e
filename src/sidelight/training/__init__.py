"""Training of calibrated probes from labelled examples, and the classifier for users."""
