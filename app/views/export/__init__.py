"""Merge and export: the dialog."""
