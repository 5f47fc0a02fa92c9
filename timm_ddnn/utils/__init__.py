"""Helpers that know nothing of what is built of them: files, costs, the machine, errors."""
