"""RoseRAG in JAX: small language models that stay right when retrieval is noisy (arXiv 2502.10993)."""

import itertools
import os
import sys

# transformers is here for tokenizers and configurations; that it finds no torch is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what is wrong with a model is said once, as an error

# `python -m roserag_jax.NAME`: signals end it in one line from here on, before what takes seconds to import.
if any(flag == "-m" and name.split(".")[0] == __name__ for flag, name in itertools.pairwise(sys.orig_argv)):
    from roserag_jax import signals

    signals.install()
