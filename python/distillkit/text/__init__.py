"""Rows of a dataset to documents of token ids, for capture and training."""
