"""Checkpoints that other programs wrote, opened without trusting them."""
