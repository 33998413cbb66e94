"""The trusted side: runs a model's forward passes, and sends linear algebra to an executor."""
