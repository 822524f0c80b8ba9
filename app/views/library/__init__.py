"""What the pages of models and of adapters share: filter, table, details, names, the trash."""
