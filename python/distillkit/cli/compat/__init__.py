"""The published commands: their names and options, implemented with this package's commands."""
