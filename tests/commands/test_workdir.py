"""The workdir: artifacts that are whole or absent, manifests, partial results, the lock, and what users put into it."""

import errno
import fcntl
import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from roserag_jax import inputs, workdir
from roserag_jax.errors import UserError
from roserag_jax.partial_results import PartialResults
from roserag_jax.workdir import Recipe, Workdir, to_json, to_jsonl

RECIPE = Recipe({"a": 1}, {"in": "x"})


def test_workdir_relative_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Workdir("runs/x").path.is_absolute() and str(Workdir("gs://bucket/x").path) == "gs://bucket/x"


def test_workdir_artifact_is_read_only_when_it_is_whole(tmp_path, capsys):
    work = Workdir(str(tmp_path))
    assert not work.is_up_to_date("rows.jsonl", RECIPE)
    work.publish("rows.jsonl", RECIPE, '{"n": 1}\n', 1)
    assert work.is_up_to_date("rows.jsonl", RECIPE) and work.rows("rows.jsonl") == [{"n": 1}]
    assert not work.is_up_to_date("rows.jsonl", Recipe({"a": 2}, {"in": "y"}))
    assert work.is_up_to_date("rows.jsonl", RECIPE)
    out = capsys.readouterr().out
    assert "out of date (config.a was 1, now 2; in has changed): rebuilding" in out
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for touch in (
        lambda: work.rows("rows.jsonl"),
        lambda: work.is_up_to_date("rows.jsonl", Recipe({"a": 3}, {"in": "x"})),
    ):
        with pytest.raises(UserError, match=r"rows.jsonl was changed or damaged .* Move .*rows.jsonl away"):
            touch()
    (tmp_path / "rows.jsonl.manifest.json").unlink()
    with pytest.raises(UserError, match="is missing"):
        work.verify("rows.jsonl")
    assert not work.is_up_to_date("rows.jsonl", RECIPE)


def test_workdir_content_counts_and_not_the_path_that_names_it(tmp_path, capsys):
    """An option whose content is an input may name it otherwise; messages still name the option's values."""
    work = Workdir(str(tmp_path))
    made = Recipe({"model": "models/a", "k": 1}, {"config.model": "x"})
    work.publish("rows.jsonl", made, "{}\n", 1)
    elsewhere = Recipe({"model": "/home/me/models/a/", "k": 1}, {"config.model": "x"})
    assert work.is_up_to_date("rows.jsonl", elsewhere) and elsewhere.fingerprint() == made.fingerprint()
    for changed_options, changed_inputs, why in (
        ({"model": "models/b", "k": 1}, {"config.model": "y"}, "config.model was 'models/a', now 'models/b'"),
        ({"model": "models/a", "k": 1}, {"config.model": "y"}, "config.model=models/a has changed"),
        ({"model": "org/a", "k": 1}, {}, "config.model was 'models/a', now 'org/a'"),
        ({"k": 1}, {}, "config.model plays no part any more"),
        ({"model": "models/a", "k": 2}, {"config.model": "x"}, "config.k was 1, now 2"),
    ):
        changed = Recipe(changed_options, changed_inputs)
        assert not work.is_up_to_date("rows.jsonl", changed) and changed.fingerprint() != made.fingerprint()
        assert f"out of date ({why}): rebuilding" in capsys.readouterr().out


@pytest.mark.parametrize("stray", [".DS_Store", "._metrics.json", ".metrics.json.swp", "README.md", "sub/notes.txt"])
def test_workdir_ignores_what_users_leave_in_an_artifact(tmp_path, stray):
    work = Workdir(str(tmp_path))
    work.publish("eval/base", RECIPE, {"metrics.json": "{}\n", "examples.jsonl": "{}\n"}, 1)
    (tmp_path / "eval/base" / stray).parent.mkdir(exist_ok=True)
    (tmp_path / "eval/base" / stray).write_text("not ours")
    (tmp_path / "eval/base/.ipynb_checkpoints").mkdir()
    (tmp_path / "eval/base/.ipynb_checkpoints/metrics-checkpoint.json").write_text("{}")
    before = work.verify("eval/base")
    assert work.is_up_to_date("eval/base", RECIPE)
    work.publish("eval/base", RECIPE, {"metrics.json": "{}\n", "examples.jsonl": "{}\n"}, 1)
    assert work.verify("eval/base") == before and (tmp_path / "eval/base" / stray).read_text() == "not ours"
    (tmp_path / "eval/base/metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics.json was deleted after it was written"):
        work.verify("eval/base")


@pytest.mark.parametrize("interrupted", [False, True])
def test_workdir_publish_leaves_no_file_of_a_former_version(tmp_path, monkeypatch, interrupted):
    """Also where the run ended between the former version and the new one."""
    work = Workdir(str(tmp_path))
    work.publish("eval/base", RECIPE, {"metrics.json": "1", "predictions_strategyqa.json": "1"}, 1)
    (tmp_path / "eval/base/mine.txt").write_text("mine")
    if interrupted:
        with monkeypatch.context() as patch:
            patch.setattr(workdir, "_file_digest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                work.publish("eval/base", RECIPE, {"metrics.json": "2"}, 1)
    work.publish("eval/base", RECIPE, {"metrics.json": "2"}, 1)
    assert {f.name for f in (tmp_path / "eval/base").iterdir()} == {"metrics.json", "manifest.json", "mine.txt"}
    assert work.is_up_to_date("eval/base", RECIPE)


def test_workdir_damaged_manifest_is_one_message(tmp_path):
    """Every single flipped bit, cut and other content of a manifest: sound, or a UserError; never another recipe."""
    work, file = Workdir(str(tmp_path)), tmp_path / "rows.jsonl.manifest.json"
    work.publish("rows.jsonl", RECIPE, '{"n": 1}\n', 1)
    sound = file.read_bytes()
    draw = random.Random(0)
    damaged = [sound[:n] for n in draw.sample(range(len(sound)), 20)]
    damaged += [
        b"",
        b"[]",
        b"null",
        b"{}",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"check": 1}',
        b"1" * 5000,
        b"\0" * 64,
    ]
    for _ in range(150):
        data, at = bytearray(sound), draw.randrange(len(sound))
        data[at] ^= 1 << draw.randrange(8)
        damaged.append(bytes(data))
    for data in damaged:
        file.write_bytes(data)
        try:
            assert work.is_up_to_date("rows.jsonl", RECIPE) and work.rows("rows.jsonl") == [{"n": 1}], data
            assert json.loads(data) == json.loads(sound)  # white space, say
        except UserError as error:
            assert "is damaged" in str(error) and str(file) in str(error)
    assert (tmp_path / "rows.jsonl").read_text() == '{"n": 1}\n'


@pytest.mark.parametrize("name", ["adapter", "eval", "checkpoints", ".parts", "tensorboard"])
def test_workdir_refuses_a_file_in_the_place_of_a_folder(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name} is a file, and a folder of that name"), Workdir(str(tmp_path)).lock():
        pass
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["candidates.jsonl", "pairs.jsonl", "candidates.jsonl.manifest.json", "metrics.jsonl"])
def test_workdir_refuses_a_folder_in_the_place_of_a_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} is a folder, and a file of that name"), Workdir(str(tmp_path)).lock():
        pass


def test_workdir_refuses_a_broken_link(tmp_path):
    (tmp_path / "adapter").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="adapter is a broken link"), Workdir(str(tmp_path)).lock():
        pass
    (tmp_path / "adapter").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "adapter").symlink_to(tmp_path / "elsewhere")
    with Workdir(str(tmp_path)).lock():
        pass


def test_workdir_whose_name_is_not_utf8_is_refused(tmp_path, monkeypatch):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with pytest.raises(UserError, match="not UTF-8 text; rename"):
        Workdir(os.fsdecode(folder))
    monkeypatch.chdir(os.fsdecode(folder))
    with pytest.raises(UserError, match="not UTF-8 text; rename"):
        Workdir("runs/x")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL])
def test_workdir_on_a_file_system_without_locks_warns(tmp_path, monkeypatch, capsys, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with Workdir(str(tmp_path)).lock():
        pass
    assert "file system without locks" in capsys.readouterr().out


def test_workdir_in_use_is_refused(tmp_path):
    first, second = Workdir(str(tmp_path)), Workdir(str(tmp_path))
    with first.lock(), pytest.raises(UserError, match="in use by another run"), second.lock():
        pass
    with Workdir(str(tmp_path)).lock():
        pass


def test_write_on_a_full_disk_names_the_file(tmp_path):
    """A limit on file sizes stands for the full disk: the error names the file, and nothing half-written stays."""
    program = (
        "import resource, sys; from pathlib import Path; from etils import epath; from roserag_jax import workdir\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "for write in (workdir.write_atomic, workdir.append):\n"
        "    try: write(epath.Path(sys.argv[1]) / 'a.jsonl', 'x' * 5000)\n"
        "    except OSError as error: print(error.errno, error.filename)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == f"{errno.EFBIG} {tmp_path}/a.jsonl\n" * 2, done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["a.jsonl"]  # what was appended before


def test_partial_results_cut_off_row_is_made_anew(tmp_path, capsys):
    """A row is there whole or not at all, whatever line separators its text holds."""
    work, ids = Workdir(str(tmp_path)), ["a", "b", "c"]
    rows = [{"id": i, "text": "one\u2028two\x85three"} for i in ids]
    partial = PartialResults(work, "generate", "0123", ids)
    for row in rows[:2]:
        partial.add(row)
    file = next((tmp_path / ".parts").rglob("*.jsonl"))
    file.write_bytes(file.read_bytes()[:-9])
    partial = PartialResults(work, "generate", "0123", ids, lambda row: row["text"])
    assert partial.missing() == [1, 2] and partial.done == {"a": rows[0]["text"]}
    assert not capsys.readouterr().out  # as after any run that was killed
    for row in rows[:0:-1]:
        partial.add(row)
    results = PartialResults(work, "generate", "0123", ids).gather()
    work.publish("rows.jsonl", Recipe({}, {}), map(to_json, results), 3)
    assert work.rows("rows.jsonl") == rows
    file = work.row_file("rows.jsonl", lambda row: row["id"])
    assert file.notes == ids and [file[i] for i in (2, 0, 1)] == [rows[i] for i in (2, 0, 1)] and list(file) == rows
    partial.clear()
    assert not list((tmp_path / ".parts").iterdir())


def test_partial_results_flipped_bit_is_noticed(tmp_path, capsys):
    """Any one flipped bit: the rows that are kept are as they were written, and the damaged one is made anew."""
    ids = ["a", "b", "c"]
    rows = {i: {"id": i, "text": f"The answer of {i} is 42.", "logprob": -1.25} for i in ids}
    work = Workdir(str(tmp_path))
    partial = PartialResults(work, "generate", "0123", ids)
    for row in rows.values():
        partial.add(row)
    file = next((tmp_path / ".parts").rglob("*.jsonl"))
    sound, draw = file.read_bytes(), random.Random(0)
    for bit in draw.sample(range(8 * len(sound)), 100):
        data = bytearray(sound)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        partial = PartialResults(work, "generate", "0123", ids, lambda row: row)
        assert all(row == rows[i] for i, row in partial.done.items()) and len(partial.done) < 3, bit
        for i in partial.missing():
            partial.add(rows[ids[i]])
        partial = PartialResults(work, "generate", "0123", ids, lambda row: row)
        assert partial.done == rows and list(partial.gather()) == list(rows.values())
    assert "partial results in" in capsys.readouterr().out


def test_partial_results_of_several_processes_are_read_by_the_first(tmp_path, monkeypatch):
    """Process 0 clears the folder once it has published the rows of all: no other reads it, however slow it is."""
    together, process, work = threading.Barrier(2), threading.local(), Workdir(str(tmp_path))
    monkeypatch.setattr("roserag_jax.distributed.processes.barrier", lambda name: together.wait(timeout=10))
    monkeypatch.setattr(jax, "process_index", lambda: process.index)

    def gather(index):
        process.index = index
        partial = PartialResults(work, "generate", "0123", ["a", "b"])
        partial.add({"id": "ab"[index]})
        found = partial.gather()
        if index == 1:
            time.sleep(0.2)
            return list(found)
        rows = list(found)
        partial.clear()
        return rows

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(gather, range(2))) == [[{"id": "a"}, {"id": "b"}], []]
    assert not list((work / ".parts").iterdir())


def test_json_never_holds_nan():
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"Row 'q1' holds a number that is not finite"):
            to_jsonl([{"id": "q0", "logprob": 1.0}, {"id": "q1", "logprob": value}])
        with pytest.raises(UserError, match="A result holds a number that is not finite"):
            to_json({"em": value}, indent=2)


def test_corpus_digest_covers_what_is_read(tmp_path):
    """A `.git`, the workdir itself and other files in the folder play no part; a document does."""
    from roserag_jax import options

    config = options.defaults()
    config.retrieve.corpus = str(tmp_path)
    (tmp_path / "moss.txt").write_text("Moss is green.")
    before = inputs.input_digest(config, "retrieve.corpus")
    for other in (".git/objects/00", "runs/one/adapter/adapter_config.json", "picture.png", ".moss.txt.swp"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("other")
    assert inputs.input_digest(config, "retrieve.corpus") == before
    Path(tmp_path / "moss.txt").write_text("Moss is red.")
    assert inputs.input_digest(config, "retrieve.corpus") != before
