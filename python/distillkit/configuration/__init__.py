"""Shared by all configuration files: reading YAML, reporting all problems at once, and documentation of settings."""
