"""How one rank trains: loop, strategies, data stream, checkpoints, storage."""
