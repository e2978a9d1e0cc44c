"""Clouds that machines come from, one file each."""
