"""The Models page: every model that Weft knows, wherever on disk it lies."""
