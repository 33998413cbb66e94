"""What is said about tensors: dtypes, limits, descriptors. Imports numpy, flatbuffers and the errors, nothing else."""
