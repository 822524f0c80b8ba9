"""The Jobs page: long work, its progress and its log."""
