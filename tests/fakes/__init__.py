"""Stand-ins for the outside world: a hub, an engine, files on disk."""
