"""What a message is: header, metadata, dtypes, codings, limits. Imports numpy, flatbuffers and the errors alone."""
