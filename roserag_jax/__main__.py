"""`roserag COMMAND ...`, or `python -m roserag_jax COMMAND ...`: runs a command; alone, lists them."""

import ast
import difflib
import runpy
import sys
from pathlib import Path

from roserag_jax import signals

# In the order of a run; each is a module that can also be run by itself (`python -m roserag_jax.train`).
COMMANDS = (
    "train",
    "index",
    "questions",
    "retrieve",
    "generate",
    "select",
    "evaluate",
    "answer",
    "export",
    "score",
    "inspect",
    "plan",
    "report",
    "watch",
)


def _summary(command: str) -> str:
    """The first line of a command's docstring; its module is not imported, which takes seconds."""
    module = Path(__file__).with_name(f"{command}.py")
    module = module if module.exists() else Path(__file__).parent / command / "__main__.py"
    source = module.read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


def listing() -> str:
    """All commands with one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command:<{width}}  {_summary(command)}" for command in COMMANDS]
    usage = "Usage: roserag COMMAND [--config FILE] [--config.section.option=VALUE ...]"
    more = "`roserag COMMAND --help` explains one, `roserag train --options` lists every option."
    return "\n".join([usage, "", *lines, "", more])


def main() -> None:
    """The console script."""
    signals.install()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(listing())
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: There is no command {name!r}{hint} (`roserag` lists them all)", file=sys.stderr)
        sys.exit(2)
    sys.argv[1:] = arguments
    runpy.run_module(f"roserag_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
