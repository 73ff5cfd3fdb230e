"""What a trained probe uses of the backbone: its layers and tokens (a BERTology view)."""
