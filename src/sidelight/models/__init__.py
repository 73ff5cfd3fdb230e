"""What a model reads and is: conversations, tokens and turns; its files and its fingerprint."""
