"""Shared memory: segments, their blocks, the arena of a connection, the ring, and whether two sides share."""
