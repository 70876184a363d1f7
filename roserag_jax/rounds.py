"""Iterated training: rounds of generate, select and train, each sampling with the adapter of the one before.

With `config.train.rounds` of N the rounds before the last have workdirs of their own, WORKDIR/rounds/1 to N-1, and the
last one is WORKDIR itself, so that whatever comes after training finds its adapter where it always is. A round's folder
has a file `round.json`. Where the number of rounds changes, what is finished is moved, and nothing is lost.
"""

from etils import epath

from roserag_jax.distributed import processes
from roserag_jax.workdir import ADAPTER, CANDIDATES, PAIRS, REWARDS, ROUND_MARK, VOTES, Workdir, to_json, write_atomic

_FOLDERS = (ADAPTER, "checkpoints", "tensorboard", "profile")
_FILES = (VOTES, CANDIDATES, REWARDS, PAIRS, "metrics.jsonl")
_STAGES = ("vote", "generate", "reward")  # whose partial results are a round's


def workdir_of(run: Workdir, number: int, rounds: int) -> Workdir:
    """The workdir of a round, from 1, with the adapter of the round before; of a single round the run's own."""
    found = Workdir(str(run.path if number == rounds else _folder(run, number)))
    if rounds > 1:
        found.label = f"round {number}: "
    if number > 1:
        found.before = _folder(run, number - 1) / ADAPTER
    return found


def earlier(run: Workdir) -> list[int]:
    """The numbers of the rounds that have folders of their own."""
    folder = run / "rounds"
    names = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit() and (folder / name / ROUND_MARK).exists())


def arrange(run: Workdir, rounds: int) -> None:
    """Make the folders of the rounds, and let the run's own workdir be that of the last one.

    What it holds of another round, because there were more or fewer, goes to that round's folder.
    """
    with processes.main_first():
        if not processes.is_main():
            return
        found = earlier(run)
        here = next(number for number in range(1, len(found) + 2) if number not in found)
        if here != rounds:
            _move(run.path, _folder(run, here))
            _mark(run, here)
            if rounds in found:
                (_folder(run, rounds) / ROUND_MARK).unlink()
                _move(_folder(run, rounds), run.path)
                _folder(run, rounds).rmtree(missing_ok=True)
        for number in range(1, rounds):
            _mark(run, number)


def _folder(run: Workdir, number: int) -> epath.Path:
    return run.path / "rounds" / str(number)


def _mark(run: Workdir, number: int) -> None:
    if not (mark := _folder(run, number) / ROUND_MARK).exists():
        write_atomic(mark, to_json({"round": number}))


def _move(source: epath.Path, target: epath.Path) -> None:
    """Move what belongs to a round, manifests last."""
    parts = source / ".parts"
    partial = [f for f in parts.iterdir() if f.name.rpartition("-")[0] in _STAGES] if parts.is_dir() else []
    manifests = [f"{name}.manifest.json" for name in _FILES]
    for entry in [*partial, *(source / name for name in (*_FOLDERS, *_FILES, *manifests))]:
        if entry.exists():
            _move_entry(entry, target / entry.relative_to(source))


def _move_entry(source: epath.Path, target: epath.Path) -> None:
    if not source.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
        return
    for entry in sorted(source.iterdir(), key=lambda entry: entry.name == "manifest.json"):
        _move_entry(entry, target / entry.name)
    source.rmtree(missing_ok=True)
