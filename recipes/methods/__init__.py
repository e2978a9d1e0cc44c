"""Training methods: how a row becomes a sample, and a batch a loss."""
