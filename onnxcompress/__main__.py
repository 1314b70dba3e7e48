"""``python -m onnxcompress``."""

from __future__ import annotations

from onnxcompress.cli import main

if __name__ == "__main__":
    main()
