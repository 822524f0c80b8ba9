"""QThread workers (QtCore only): they turn events into signals; one owns one engine."""
