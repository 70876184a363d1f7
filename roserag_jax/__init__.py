"""RoseRAG in JAX: small language models that stay right when retrieval is noisy (arXiv 2502.10993)."""

import os

# transformers is here for tokenizers and configurations; that it finds no torch is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
