"""What to train: the typed recipe, its checks, the training methods and the YAML recipes."""
