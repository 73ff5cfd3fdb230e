"""Models and their input: conversations, tokens and turns; model files and fingerprints."""
