"""What every command shares: flags, the compilation cache, signals and exit codes.

A command takes `--config file.py` (a file with `get_config()`) and any number of `--config.section.option=value`.
"""

import difflib
import errno
import itertools
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from roserag_jax.errors import UserError
from roserag_jax.options import defaults, describe, validate, walk


def get_config() -> ConfigDict:
    """The configuration where `--config` names none; a command is then told the rest by its options."""
    return defaults()


def _flag_error(error: Exception) -> str:
    """What was meant, for an option that does not exist or a value that does not fit."""
    text = str(error).strip('"').splitlines()[0]
    names = [name for name, _ in walk()]
    for argument, behind in itertools.pairwise([*sys.argv[1:], ""]):
        file = behind if argument == "--config" else argument.partition("--config=")[2]
        if file and not Path(file.partition(":")[0]).is_file():
            return f"There is no configuration file {file}"
        if not argument.startswith("--config."):
            continue
        given = argument.removeprefix("--config.").split("=")[0]
        if given not in names:
            near = difflib.get_close_matches(given, names, n=1, cutoff=0.4)
            near = near or [n for n in names if n.rsplit(".", 1)[-1] == given.rsplit(".", 1)[-1]]
            hint = f"; did you mean config.{near[0]}?" if near else ""
            return f"There is no option config.{given}{hint} (--options lists them all)"
    return text


def keep_compiled() -> None:
    """Keep what is compiled between commands, in the user's cache unless JAX's own variable names a folder.

    By host, for what is compiled for one CPU need not run on another that sees the same home.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path("~/.cache/roserag_jax").expanduser() / platform.node()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", 4 << 30)


def main(run: Callable[[ConfigDict], None], doc: str, workdir: bool = True, alone: bool = False) -> None:
    """Run a command: read its options, call `run(config)`, and turn errors meant for people into one line.

    Args:
      workdir: whether the command needs `config.workdir`.
      alone: whether it is for one process.

    Exit status: 0 done; 2 something for the user to put right; 130 Ctrl-C and 143 SIGTERM, after which the same command
    goes on where it stopped.
    """
    flags.DEFINE_bool("options", False, "list every option with its default and meaning, and exit")

    from roserag_jax.distributed import processes

    def start(argv, config):
        if len(argv) > 1:
            raise UserError(f"Unexpected argument {argv[1]!r}; options are written --config.section.option=value.")
        validate(config, workdir)
        if alone and config.distributed:
            raise UserError("config.distributed: this command is for one process; leave it empty.")
        processes.start(config.distributed)
        run(config)

    if {"--help", "-h", "--options"} & set(sys.argv[1:]):
        print(f"{doc.strip()}\n")
        if "--options" in sys.argv:
            print(f"Options (config.py):\n{describe()}")
        else:
            print("  --config FILE                    the configuration, for example configs/quickstart.py")
            print("  --config.section.option=VALUE    sets one option")
            print("  --options                        lists every option with its default and meaning")
            for flag in flags.FLAGS.flags_by_module_dict().get(sys.argv[0], []):
                if flag.name not in ("config", "options"):
                    print(f"  --{flag.name:<31}{flag.help}")
        return
    keep_compiled()
    terminate = lambda *_: sys.exit(143)
    signal.signal(signal.SIGTERM, terminate)
    try:
        # Its default is a file, and so is read here; another one is read when it is asked for.
        config_flags.DEFINE_config_file("config", __file__, "the configuration file; --config.a.b=value sets an option")
        arguments, config = flags.FLAGS(sys.argv), flags.FLAGS.config
        if {name for name, _ in defaults().items()} - set(config):
            raise ValueError("a configuration file's get_config() must start from roserag_jax.options.defaults()")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        print(f"error: {_flag_error(error)}", file=sys.stderr)
        sys.exit(2)
    try:
        start(arguments, config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            why = f"no space left on the disk ({error.filename}); free some and run the same command."
        elif isinstance(error, PermissionError) or error.errno == errno.EROFS:
            why = f"{error.filename}: {error.strerror}."
        else:
            raise
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped. What was finished is kept; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)
