"""Hidden states of labelled texts: computed once, kept on disk, read by training and scoring."""
