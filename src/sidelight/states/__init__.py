"""The frozen model, and hidden states of labelled texts: computed once, kept on disk."""
