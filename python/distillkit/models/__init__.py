"""Handling of Hugging Face models: output heads, layers and adapters."""
