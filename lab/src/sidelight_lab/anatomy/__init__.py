"""What probes use of the backbone: layers, tokens, labels and settings (a BERTology view)."""
