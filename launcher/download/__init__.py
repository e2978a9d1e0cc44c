"""Models and data, fetched ahead for nodes that reach nothing outside."""
