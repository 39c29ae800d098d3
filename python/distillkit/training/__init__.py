"""Trains a student from a YAML file: configuration, data, teacher signals, trainer."""
