"""What a run tells while it works, and writes down in metrics.jsonl. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Emit = Callable[[str, Any], None]
"""Is told a record by its kind, ("note", line) or ("training", whether the rank trains)."""
