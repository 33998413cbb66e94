"""The untrusted side: holds weights and KV caches, and computes what the TEE side asks for."""
