"""What several tests use: tiny models and datasets, float64 oracles, disks that fill up, launchers."""
