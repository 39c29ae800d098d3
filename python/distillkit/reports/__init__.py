"""Reports on training runs, comparisons of runs, and inspections of captured datasets."""
