"""What every command shares: flags, exit codes, the compilation cache, and what is printed where.

A command takes `--config file.py` (a file with `get_config()`) and any number of `--config.section.option=value`.

Exit status: 0 done; 2 something for the user to put right, in one line; 130 Ctrl-C and 143 SIGTERM, and 134 one of
several processes was lost or hangs, after which the same command resumes where it stopped; 141 nobody reads the output
any more. Anything else is a defect and a traceback.
"""

import contextlib
import difflib
import io
import itertools
import logging
import os
import platform
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO

from absl import flags
from ml_collections import ConfigDict, config_flags

from roserag_jax import signals
from roserag_jax.distributed.channel import LOST, ProcessLost
from roserag_jax.errors import UserError, causes, disk_error, first_line
from roserag_jax.options import defaults, describe, get, validate, walk
from roserag_jax.user_cache import user_cache
from roserag_jax.workdir import naming, to_json


def get_config() -> ConfigDict:
    """The configuration where `--config` names none; a command is then told the rest by its options."""
    return defaults()


def _flag_error(error: Exception) -> str:
    """What was meant, for an option that does not exist or a value that does not fit."""
    text = first_line(error).strip('"')
    names = [name for name, _ in walk()]
    for file in _config_files():
        if not os.path.isfile(file):
            return f"There is no configuration file {file}"
    for argument in sys.argv[1:]:
        if not argument.startswith("--config."):
            continue
        given = argument.removeprefix("--config.").split("=")[0]
        if given not in names:
            near = difflib.get_close_matches(given, names, n=1, cutoff=0.4)
            near = near or [n for n in names if n.rsplit(".", 1)[-1] == given.rsplit(".", 1)[-1]]
            hint = f"; did you mean config.{near[0]}?" if near else ""
            return f"There is no option config.{given}{hint} (--options lists them all)"
    return text


def _config_file_error(error: BaseException) -> str | None:
    """What is wrong in a configuration file, which is code of the user's, and where; None for an error of another."""
    for file in _config_files():
        if "has no attribute 'get_config'" in str(error):
            return f"{file} has no function get_config(); see those in configs/."
        for cause in causes(error):
            places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(cause.__traceback__)]
            places += [(cause.filename or "", cause.lineno)] if isinstance(cause, SyntaxError) else []
            lines = [line for name, line in places if os.path.abspath(name) == os.path.abspath(file)]
            if lines:
                return f"{file}, line {lines[-1]}: {_unknown_option(cause) or f'{type(cause).__name__}: {cause}'}."
    return None


def _unknown_option(error: BaseException) -> str | None:
    """A sentence for an option that a configuration lacks; None for any other error."""
    found = re.search(r'Key "(.*?)" does not exist', str(error))
    if found is None:
        return None
    near = re.search(r'Did you mean "(.*?)"', str(error))
    hint = f"; did you mean {near.group(1)}?" if near else ""
    return f"there is no option {found.group(1)} in this section{hint} (--options lists them all)"


def _config_files() -> list[str]:
    """The files that `--config` names, as they were typed; an argument of its own may follow a colon."""
    named = [
        behind if argument == "--config" else argument.partition("--config=")[2]
        for argument, behind in itertools.pairwise([*sys.argv[1:], ""])
    ]
    return [file.partition(":")[0] for file in named if file]


def _let_configs_import_one_another() -> None:
    """Put the folder above a configuration file's package first on the path, for its `from configs import base`."""
    for file in _config_files():
        folder = os.path.dirname(os.path.abspath(os.path.expanduser(file)))
        while os.path.isfile(os.path.join(folder, "__init__.py")):
            folder = os.path.dirname(folder)
            sys.path.insert(0, folder)


def _parse_flags() -> tuple[list[str], ConfigDict]:
    """The arguments that are no flags, and the configuration.

    Raises:
      UserError: an option does not exist or has a value of the wrong type, or the configuration file is not usable.
    """
    _let_configs_import_one_another()
    try:
        # Its default is a file, and so is read here; another one is read when its flag is.
        config_flags.DEFINE_config_file("config", __file__, "the configuration file; --config.a.b=value sets an option")
        arguments, config = flags.FLAGS(sys.argv), flags.FLAGS.config
        if not isinstance(config, ConfigDict) or {name for name, _ in defaults().items()} - set(config):
            raise ValueError("a configuration file's get_config() must return roserag_jax.options.defaults(), changed")
    except Exception as error:
        if why := _config_file_error(error):
            raise UserError(why) from error
        if isinstance(error, flags.Error | AttributeError | KeyError | TypeError | ValueError | OSError | ImportError):
            raise UserError(_flag_error(error)) from error
        raise
    return arguments, config


def _drop_trailing_slashes(config: ConfigDict) -> None:
    """Call each folder by one name: with the slash that a shell adds, everything made from it would be out of date."""
    for name, _ in walk():
        value = get(config, name)
        if isinstance(value, str) and value.endswith("/") and os.path.isdir(os.path.expanduser(value)):
            config.update_from_flattened_dict({name: value.rstrip("/") or "/"})


def cache_compilations() -> None:
    """Keep compiled programs between commands, in the user's cache unless JAX's own variable names a folder.

    By host, for a program that is compiled for one CPU need not run on another that sees the same home. A user without
    a home that can be written (in a container) compiles anew each time.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = user_cache()
    if cache is None:
        return
    folder = str(cache / platform.node())
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_compilation_cache_max_size", 4 << 30)


@contextlib.contextmanager
def messages_on_stderr() -> Iterator[TextIO]:
    """Print everything to standard error in the block; yields standard output, which is for the results alone."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield stdout


def json_line(row: dict, file: TextIO) -> str:
    """A row as a line of JSON that a stream can encode, whatever its encoding."""
    return to_json(row, ascii_only="utf" not in (file.encoding or "utf-8").lower())


def print_help(doc: str, arguments: flags.FlagValues) -> None:
    """Print a command's docstring and its own arguments, or with `--options` every option."""
    print(f"{doc.strip()}\n")
    if "--options" in sys.argv:
        print(f"Options (roserag_jax/options/):\n{describe()}")
        return
    print("  --config FILE                    the configuration, for example configs/quickstart.py")
    print("  --config.section.option=VALUE    sets one option")
    print("  --options                        lists every option with its default and meaning")
    for name in arguments:
        print(f"  --{name:<31}{arguments[name].help}")


def _run(run: Callable[[ConfigDict], None], workdir: bool, model: bool, alone: bool) -> None:
    """Read the options, join the run's other processes and call `run(config)`."""
    from roserag_jax.distributed import processes

    arguments, config = _parse_flags()
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; options are written --config.section.option=value.")
    validate(config, workdir, model)
    _drop_trailing_slashes(config)
    _disk_errors.place = config.workdir
    if alone and config.distributed:
        raise UserError("config.distributed: this command is for one process; leave it empty.")
    cache_compilations()
    try:
        processes.start(config)
        if config.distributed:  # or a run would mix the texts of two models
            _check_same_model(config)
        run(config)
        processes.leave(0)
    except BaseException as error:
        if processes.several():
            _end_with_others(error)
        raise


def _check_same_model(config: ConfigDict) -> None:
    """Check that all processes find the same files where the options say.

    Raises:
      UserError: they do not, in every process.
    """
    from roserag_jax.distributed import processes
    from roserag_jax.hub import model_files

    for name, revision, weights in (("model", config.revision, True), ("tokenizer", "", False)):
        if config[name]:
            found = model_files.fingerprint(config[name], revision or None, weights)
            processes.check_equal(f"config.{name}={config[name]}", found)


class _DiskErrors(logging.Filter):
    """Keeps what libraries report of a full disk off the terminal, where our one line is to be read.

    Their threads find it first, log it with tracebacks, die, and leave errors of other kinds behind.
    """

    first: str | None = None  # the message for it
    place = ""  # the workdir

    def message(self, error: BaseException | None) -> str | None:
        """The message for an error of a full disk, or for one that came after it; None for any other."""
        self.first = self.first or disk_error(error, self.place)
        return self.first

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a log record is to be shown."""
        error = record.exc_info[1] if record.exc_info else None
        return not self.message(error or Exception(record.getMessage()))

    def install(self) -> None:
        """Listen to the loggers and threads of Orbax, tensorstore and TensorBoard."""
        for name in ("absl", "asyncio", "orbax"):
            logging.getLogger(name).addFilter(self)
        in_thread, unraisable = threading.excepthook, sys.unraisablehook
        threading.excepthook = lambda args: None if self.message(args.exc_value) else in_thread(args)
        sys.unraisablehook = lambda args: None if self.message(args.exc_value) else unraisable(args)


_disk_errors = _DiskErrors()


_OUTPUT = "standard output"


class _Output(io.TextIOWrapper):
    """Standard output that names itself in errors (a log on a full disk) and lacks no letter."""

    def write(self, text: str) -> int:
        with naming(_OUTPUT):
            return super().write(text)

    def flush(self) -> None:
        with naming(_OUTPUT):
            super().flush()


def _open_output() -> None:
    """Make standard output and standard error ready to print to, also where they are closed (`>&-`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays open)
    sys.stderr.reconfigure(errors="backslashreplace")
    out = sys.stdout
    sys.stdout = _Output(
        out.detach(),
        encoding=out.encoding,
        errors="backslashreplace",
        line_buffering=out.line_buffering,
        write_through=out.write_through,
    )


def _drop_output() -> None:
    """Send what is still to be printed nowhere: Python would try once more at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _user_message(error: BaseException) -> str | None:
    """What the user can put right about an error; None for a defect."""
    if isinstance(error, OSError) and error.filename == _OUTPUT:
        _drop_output()
    return str(error) if isinstance(error, UserError) else _disk_errors.message(error)


def _exit_status(error: BaseException) -> int | None:
    """The exit status for an error that is not a defect, after printing its one line; None for a defect."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if number := signals.stopped():
        print(signals.message(number), file=sys.stderr)
        return signals.STOPS[number]
    if isinstance(error, BrokenPipeError):  # as in `roserag score ... | head`
        _drop_output()
        return 141
    if isinstance(error, ProcessLost):
        print(f"error: {error}", file=sys.stderr)
        return LOST
    if why := _user_message(error):
        print(f"error: {why}", file=sys.stderr)
        return 2
    return None


def _end_with_others(error: BaseException) -> NoReturn:
    """End this process of several, and the others with it, for the same reason and with the same status."""
    from roserag_jax.distributed import processes

    message = _user_message(error) or first_line(error)
    if number := signals.stopped():
        message = signals.message(number)
    defect = not (number or _user_message(error) or isinstance(error, SystemExit | BrokenPipeError | ProcessLost))
    processes.begin_end(defect)
    if defect:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {message}"
    status = _exit_status(error)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    processes.leave(1 if status is None else status, message)
    os._exit(1 if status is None else status)  # in its own way of ending JAX would wait for the others


def main(
    run: Callable[[ConfigDict], None],
    doc: str,
    arguments: flags.FlagValues | None = None,
    workdir: bool = True,
    model: bool = True,
    alone: bool = False,
    resumes: bool = True,
) -> None:
    """Run a command: read its options, call `run(config)`, and turn what is not a defect into one line.

    Args:
      arguments: those that the command has beside the configuration; they are read after `run` was called.
      workdir: whether the command needs `config.workdir`.
      model: whether it needs `config.model`.
      alone: whether it is for one process.
      resumes: whether a stopped command resumes when it is run again.
    """
    flags.DEFINE_bool("options", False, "list every option with its default and meaning, and exit")
    arguments = arguments or flags.FlagValues()
    flags.FLAGS.append_flag_values(arguments)  # now, for commands may have some of the same name
    arguments.mark_as_parsed()
    asks_for_help = {"--help", "-h", "--options"} & set(sys.argv[1:])
    guard(lambda: print_help(doc, arguments) if asks_for_help else _run(run, workdir, model, alone), resumes)


def guard(run: Callable[[], None], resumes: bool = False) -> None:
    """Run a command, which may have arguments of its own, and turn what is not a defect into one line.

    Args:
      resumes: whether it resumes when it was stopped and is run again.
    """
    signals.install()
    if not resumes:
        signals.set_consequence(signals.STARTS_OVER)
    _disk_errors.install()
    _open_output()
    try:
        run()
        sys.stdout.flush()
    except BaseException as error:
        status = _exit_status(error)
        if status is None:
            raise
        signals.finish(status)
        if signals.stopped():  # threads that compile or write may crash the interpreter while it ends
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(status)
        sys.exit(status)
    signals.finish()
