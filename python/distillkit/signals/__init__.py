"""What the trainer gets from a teacher for a batch: the interface (`types`), stored distributions (`offline`), and
whether they line up (`alignment`).

Importing this package does not import torch; its modules `types` and `offline` do.
"""
