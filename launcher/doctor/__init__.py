"""Whether nodes are fit to train: measured, judged, and the bad ones left out."""
