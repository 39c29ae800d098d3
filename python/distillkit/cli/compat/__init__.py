"""The published commands: their names and options, over the commands of this package."""
