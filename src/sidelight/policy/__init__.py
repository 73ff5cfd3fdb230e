"""What follows from verdicts: rules, decisions, and text held back until it is judged."""
