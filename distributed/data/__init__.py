"""The data stream: which rows a step trains on, as a function of (manifest, seed, step)."""
