"""Runs as they stand: one of them, or all below a folder."""
