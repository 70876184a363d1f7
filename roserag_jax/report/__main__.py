"""Write the report of a run: one HTML file to look at what was shown, sampled, selected, trained and answered.

    python -m roserag_jax.report WORKDIR [--compare WORKDIR2 ...] [--output page.html]

The file needs no network. A workdir that is incomplete, or in which a run is under way, gives a page with what is
there. `train` writes it at its end.
"""

import argparse

from roserag_jax import cli
from roserag_jax.errors import UserError, disk_error, first_line
from roserag_jax.report.page import write_page


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="roserag report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", help="the workdir of a run")
    parser.add_argument("--compare", nargs="+", default=[], metavar="WORKDIR", help="workdirs of other runs")
    parser.add_argument("--output", default="", help="the file to write; by default report.html in the workdir")
    arguments = parser.parse_args()
    try:
        path = write_page([arguments.workdir, *arguments.compare], arguments.output)
    except OSError as error:
        raise UserError(disk_error(error, arguments.output or arguments.workdir) or first_line(error)) from error
    print(f"Wrote {path} ({path.stat().length / 1e6:.1f} MB). Open it in a browser.")


if __name__ == "__main__":
    cli.guard(main)
