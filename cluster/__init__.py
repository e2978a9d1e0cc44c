"""Where Ray comes from: one file per kind of cluster."""
