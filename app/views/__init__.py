"""Widgets: no files, no processes, no machine learning."""
