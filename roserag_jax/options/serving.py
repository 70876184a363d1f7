"""Options of `answer --serve`."""

import re

from roserag_jax.options.option import Option

_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.IGNORECASE)


def _host_names(value) -> str | None:
    good = all(isinstance(name, str) and _HOST_NAME.fullmatch(name) for name in value)
    return None if good else "a tuple of host names, without scheme and port"


def _address(value) -> str | None:
    return None if value.strip() else "name an address; an empty one would be every address of the machine"


SERVE = {
    "host": Option(
        "127.0.0.1",
        "address that the server listens on; 0.0.0.0 is every IPv4 address of the machine",
        check=_address,
    ),
    "names": Option(
        (), "host names by which the server may be asked, besides IP addresses and localhost", check=_host_names
    ),
    "slots": Option(8, "completions that each model decodes at a time", at_least=1),
    "waiting": Option(
        64, "completions that may wait for a slot of a model; a request beyond is refused with status 429", at_least=1
    ),
    "max_tokens": Option(512, "most new tokens of a completion, and how many where a request names none", at_least=1),
    "seconds": Option(120, "most seconds that a request may take, waiting included; it then ends with 408", at_least=1),
}
