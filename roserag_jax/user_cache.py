"""The folder in which the user's programs keep what they can rebuild: compiled programs, indexes of corpora."""

import os
from pathlib import Path


def user_cache() -> Path | None:
    """`roserag_jax` in the user's cache folder; None for a user without a home (in some containers)."""
    found = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(found) / "roserag_jax" if os.path.isabs(found) else None
