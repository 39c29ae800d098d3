"""The configuration of a training run: its schema, its file, the trainer's arguments."""
