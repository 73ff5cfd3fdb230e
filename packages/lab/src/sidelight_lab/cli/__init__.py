"""The laboratory's commands. Each is a file, and imports what is heavy when it runs."""
