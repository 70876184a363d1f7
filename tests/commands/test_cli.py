"""What every command shares: help, one line for bad input, a full disk, streams and folders that are missing."""

import errno
import functools
import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_command

from roserag_jax import __main__, cli, options, retrieve
from roserag_jax.errors import UserError, disk_error
from roserag_jax.user_cache import user_cache
from roserag_jax.workdir import Workdir, digest

ROOT = Path(__file__).parents[2]
DEFINE_CONFIG_FILE = cli.config_flags.DEFINE_config_file


def run(*arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_cli_bad_input_is_one_message(config_of, tmp_path, questions):
    """A non-zero exit and one line that says what to do; what was made stays."""
    config = config_of(questions)
    retrieve.make(config, Workdir(config.workdir))
    kept = digest(Workdir(config.workdir) / "retrieved.jsonl")
    unreadable = tmp_path / "bad.jsonl"
    unreadable.write_text(questions.read_text() + "{no json\n")
    for arguments, expected in [
        ([f"--config.data.train={unreadable}", "--config.data.train_rows=0"], "line 7: not valid JSON"),
        (["--config.model=/nowhere/model"], "no folder /nowhere/model"),
        (["--config.mesh.tensor=7", "--config.mesh.fsdp=3"], "does not make 1 devices"),
    ]:
        done = run_command("generate", config, *arguments)
        assert done.returncode == 2 and expected in done.stderr, (arguments, done.stderr[-2000:])
        assert "Traceback" not in done.stderr
    assert digest(Workdir(config.workdir) / "retrieved.jsonl") == kept
    with Workdir(config.workdir).lock():
        done = run_command("retrieve", config)
        assert done.returncode == 2 and "in use by another run" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.generate.sampels=3"], "no option config.generate.sampels; did you mean config.generate"),
        (["--config.train.epochs=many"], "many"),
        (["train"], "Unexpected argument 'train'"),
        (["--config=none.py"], "There is no configuration file none.py"),
        (["--config.workdir=caf\udce9"], "is not UTF-8 text; rename"),
    ],
)
def test_cli_flags_that_do_not_parse_are_one_message(arguments, expected):
    done = run("-m", "roserag_jax.retrieve", "--config.model=m", *arguments)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("config.model = modle", "line 4: NameError: name 'modle' is not defined."),
        ("config.train.epoch = 3", "line 4: there is no option epoch in this section; did you mean epochs?"),
        ("config.train.epochs = 'a'", "line 4: TypeError: Could not override field 'epochs'"),
        ("config.model = = 'm'", "line 4: SyntaxError: invalid syntax"),
        ("raise ValueError", "line 4: ValueError: ."),
        ("config = None", "must return roserag_jax.options.defaults(), changed"),
    ],
)
def test_cli_configuration_file_that_fails_is_named_with_its_line(line, expected, tmp_path, monkeypatch, capsys):
    """The file is code of the user's: whatever it raises is no defect of ours."""
    file = tmp_path / "mine.py"
    file.write_text(
        f"from roserag_jax import options\ndef get_config():\n    config = options.defaults()\n    {line}\n"
    )
    with file.open("a") as more:
        more.write("    return config\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["retrieve", "--config", "mine.py"])
    monkeypatch.setattr(cli.flags, "FLAGS", cli.flags.FlagValues())
    monkeypatch.setattr(
        cli.config_flags, "DEFINE_config_file", functools.partial(DEFINE_CONFIG_FILE, flag_values=cli.flags.FLAGS)
    )
    with pytest.raises(UserError) as raised:
        cli._parse_flags()
    assert expected in str(raised.value)
    assert str(raised.value).startswith("mine.py, line 4: ") or line == "config = None"


def test_cli_folders_have_one_name(tmp_path):
    """With and without the slash that a shell adds, or all that was made from a model would be made again."""
    config = options.defaults()
    config.model, config.retrieve.corpus, config.retrieve.query_prefix = f"{tmp_path}//", "/", "query/"
    cli._drop_trailing_slashes(config)
    assert (config.model, config.retrieve.corpus, config.retrieve.query_prefix) == (str(tmp_path), "/", "query/")


def test_cli_help_and_options():
    done = run("-m", "roserag_jax.score", "--help")
    assert done.returncode == 0 and "--input" in done.stdout and "--config FILE" in done.stdout
    done = run("-m", "roserag_jax.train", "--options")
    assert all(f"--config.{name}=" in done.stdout and option.help in done.stdout for name, option in options.walk())


def test_cli_commands_are_imported_beside_one_another():
    """As a library: two of them have an argument of the same name."""
    for command in __main__.COMMANDS:
        importlib.import_module(f"roserag_jax.{command}")


def test_cli_lists_and_runs_the_commands():
    done = run("-m", "roserag_jax")
    assert done.returncode == 0
    for command in __main__.COMMANDS:
        assert f"  {command} " in done.stdout
    every = {file.stem for file in (ROOT / "roserag_jax").glob("*.py") if "cli.main(" in file.read_text()}
    without_configuration = {"report", "watch"}
    assert every - {"cli"} | without_configuration == set(__main__.COMMANDS)
    done = run("-m", "roserag_jax", "trian")
    assert done.returncode == 2 and "no command 'trian'; did you mean train?" in done.stderr
    done = run("-m", "roserag_jax", "score", "--config.model=m", "--config.workdir=w")
    assert done.returncode == 2 and "--input FILE is missing" in done.stderr


def test_cli_configuration_imports_its_package_from_anywhere(tmp_path):
    """`from configs import base` works from another folder, whatever is called `configs` there."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/__init__.py").touch()
    line = [sys.executable, "-m", "roserag_jax", "retrieve", "--config", str(ROOT / "configs/qwen1_5b.py")]
    line += ["--config.seed=-1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/..")}
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stderr == "error: config.seed=-1: must be at least 0.\n"


def test_cli_without_a_home_and_with_ascii_output(config_of):
    """A container's user: no home that can be written, and a terminal that knows ASCII alone."""
    environment = {"HOME": "/proc/nowhere", "PYTHONIOENCODING": "ascii", "JAX_COMPILATION_CACHE_DIR": ""}
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | environment
    del environment["JAX_COMPILATION_CACHE_DIR"]
    line = [sys.executable, "-m", "roserag_jax.inspect", f"--config.model={config_of().model}"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "'\\u0143'" in done.stdout, done.stderr


@pytest.mark.parametrize("cache", ["", "relative/cache"])
def test_user_cache_without_a_home_is_none(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user that no database knows
    assert user_cache() is None


def test_cli_unknown_home_of_a_user_in_a_path_is_one_message():
    done = run("-m", "roserag_jax.retrieve", "--config.model=m", "--config.workdir=w", "--config.data.train=~nobody1/x")
    assert done.returncode == 2 and "config.data.train='~nobody1/x': there is no such file" in done.stderr


@pytest.mark.parametrize("module", ["report.comparison", "watch"])
def test_cli_commands_without_a_configuration_end_as_the_others(module, tmp_path):
    """Bad input is one line and status 2, with letters that the terminal lacks."""
    done = run("-m", f"roserag_jax.{module}", str(tmp_path / "caf\xe9"), PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "caf\\xe9" in done.stderr


def test_cli_nobody_reads_the_output():
    for command in ("train --options", "watch --help"):
        line = f"{sys.executable} -m roserag_jax.{command} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode in (0, 141) and not done.stderr, done.stderr


@pytest.mark.parametrize(("to", "status", "printed"), [(">/dev/full", 2, 1), (">&-", 0, 0), (">&- 2>&-", 0, 0)])
def test_cli_output_to_a_full_disk_or_to_nowhere(to, status, printed):
    line = f"{sys.executable} -m roserag_jax.select --options {to}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    expected = "error: standard output: no space left on device; free some space and run the same command again.\n"
    assert done.stderr == expected * printed


def test_disk_error_names_file_or_place():
    """As Python reports it, as C++ does, and deep in what another error was raised from."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (
        disk_error(full, "runs/x") == "runs/x: no space left on device; free some space and run the same command again."
    )
    named = OSError(errno.EROFS, os.strerror(errno.EROFS), "/mnt/a")
    assert disk_error(named, "runs/x").startswith("/mnt/a: read-only file system; name a folder")
    orbax = ValueError('RESOURCE_EXHAUSTED: Error writing local file "/w/arrays": No space left on device [os_error]')
    wrapped = RuntimeError("the thread failed")
    wrapped.__cause__ = ExceptionGroup("several", [KeyError("a"), orbax])
    assert disk_error(wrapped).startswith("/w/arrays: no space left on device")
    assert disk_error(ValueError("no")) is None and disk_error(PermissionError(errno.EPERM, "not permitted")) is None


def test_disk_errors_that_libraries_log_stay_off_the_terminal(caplog):
    """The first is remembered, and what comes after it is its consequence; before, everything is shown."""
    quiet, logger = cli._DiskErrors(), logging.getLogger("test_disk_errors")
    logger.addFilter(quiet)
    logger.error("something else")
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/w/x")
    except OSError:
        logger.exception("a thread raised an exception")
    logger.error("handle is closed")
    assert [record.message for record in caplog.records] == ["something else"]
    assert (
        quiet.first.startswith("/w/x: no space left") and quiet.message(ValueError("handle is closed")) == quiet.first
    )
