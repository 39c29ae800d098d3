"""Reports on finished work: a training run, several side by side, a captured dataset."""
