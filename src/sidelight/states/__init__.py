"""Hidden states of texts: how models are read, and states that are kept on disk."""
