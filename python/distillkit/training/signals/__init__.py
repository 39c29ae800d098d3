"""The teacher's signal for a batch: the interface (`base`), stored distributions (`stored`), and a live teacher next to
the student (`live`).

Importing this package does not import torch; its modules do.
"""
