"""How fast stages were on this machine, kept in the user's cache: what a run's estimate is made from."""

import contextlib
import hashlib
import json
import platform

import jax

from roserag_jax import options
from roserag_jax.user_cache import user_cache
from roserag_jax.workdir import to_json, write_atomic

# Options that a stage's speed depends on, beside the model's; by the stage's kind.
_DEPENDS = {
    "generate": ("prompt", "generate", "select.labels"),
    "evaluate": ("prompt", "evaluate.max_tokens", "evaluate.batch"),
    "train": ("prompt", "lora", "data.pairs", "train.loss", "train.batch", "train.accumulate", "train.remat"),
}
_MODEL = ("model", "revision", "dtype", "merge", "mesh")


def key(config, kind: str, **more) -> str:
    """What the speed of a stage depends on, as a name: options, devices and host.

    Args:
      kind: 'generate', 'evaluate' or 'train'.
      more: what else it depends on, such as the number of passages.
    """
    device = [jax.devices()[0].device_kind, jax.device_count(), platform.node()]
    text = json.dumps([options.subset(config, *_MODEL, *_DEPENDS[kind]), device, more], sort_keys=True, default=list)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def record(name: str, seconds: float) -> None:
    """Keep how many seconds a unit of work took, in place of what was known. Without a user's cache nothing is kept."""
    if file := _file():
        with contextlib.suppress(OSError):
            write_atomic(file, to_json(_read(file) | {name: round(seconds, 4)}))


def seconds_each(name: str) -> float | None:
    """How many seconds a unit of work took the last time; None if that is not known."""
    file = _file()
    found = _read(file).get(name) if file else None
    return float(found) if isinstance(found, int | float) else None


def clock(seconds: float) -> str:
    """Time as m:ss or h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def about(seconds: float) -> str:
    """Time as people say it."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 90 else f"about {minutes / 60:.1f} h"


def _file():
    from etils import epath

    cache = user_cache()
    return epath.Path(cache / "rates.json") if cache else None


def _read(file) -> dict:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text())
        return found if isinstance(found, dict) else {}
    return {}
