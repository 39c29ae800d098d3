"""The teacher's signal for a batch: the interface (`base`), stored distributions (`stored`), a live teacher next to the
student (`live`), a served one (`served`), and several of these (`several`).

Importing this package does not import torch; its modules do.
"""
