"""One file per long job; each runs in a child process and is found by name."""
