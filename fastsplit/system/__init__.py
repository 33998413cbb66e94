"""What a process has of its system, and loses: shortage, threads, signals, forks. Knows nothing of tensors."""
