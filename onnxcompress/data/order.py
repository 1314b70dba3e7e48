"""Which files of a folder are data, and in which order."""

from __future__ import annotations

import re

__all__ = ["ARRAY_SUFFIXES", "IMAGE_SUFFIXES", "natural_order"]

ARRAY_SUFFIXES = (".npy", ".npz")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts ``batch_10`` after ``batch_9``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]
