"""The ``sidelight`` command. Each subcommand is a file; what is heavy is imported when it runs."""
