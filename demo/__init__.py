"""The demonstration: a real model out of a package, completed by two processes. `make demo` runs it. Not installed."""
