"""What the trainer gets from a teacher for a batch: the interface (`base`), stored distributions (`stored`), and a live
teacher beside the student (`live`).

Importing this package does not import torch; its modules do.
"""
