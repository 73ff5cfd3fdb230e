"""From labelled examples to calibrated probes, and the classifier that users hold."""
