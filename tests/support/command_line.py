"""Options that make a training of seconds."""

from __future__ import annotations

SMALL = ["--nf", "4", "--num-classes", "3", "--sigma-end", "0.1", "--batch", "4"]
