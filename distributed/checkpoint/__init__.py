"""The one checkpoint format: consolidated Hugging Face files with the training state beside them."""
