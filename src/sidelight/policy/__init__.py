"""The consequences of verdicts: rules, decisions, and text held back until it is classified."""
