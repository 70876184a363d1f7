"""Configurations: each file's `get_config()` starts from `configs.base` and sets what is its own."""
