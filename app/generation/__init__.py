"""What backends share when they generate text: templates, fitting the context, stop strings, UTF-8.

Imports the standard library, msgspec and (in the renderer's own process) jinja2 only.
"""
