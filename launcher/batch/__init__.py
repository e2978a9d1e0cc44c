"""Several recipes, or a sweep, as one batch of runs."""
