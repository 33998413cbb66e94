"""The blocking front: callers' own threads wait."""
