"""Turns dataset rows into documents of token ids, for capture and training."""
