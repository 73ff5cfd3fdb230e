"""Training of mechanisms on cached hidden states. Knows labels and logits, not texts."""
