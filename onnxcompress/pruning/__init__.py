"""Structured pruning: which channels go together, which to remove, how to cut them out, how to repair the rest."""

__all__: list[str] = []
