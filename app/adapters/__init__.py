"""Adapter arithmetic that loaders and tasks share. See docs/adapter_arithmetic.md for what a stack means.

Modules here import numpy or torch inside functions, or, where their name ends in `_torch`, at their top: the room itself
can be imported anywhere.
"""
