"""A server of the small random model, a random adapter and a corpus."""

import pytest
from conftest import random_adapter, write_files
from etils import epath

from roserag_jax.hub import peft_adapter
from roserag_jax.models.lora import LoRAConfig
from roserag_jax.retrieval.registry import open_retriever
from roserag_jax.session import Session


@pytest.fixture(scope="session")
def served(config_of, tmp_path_factory):
    """What a server over the small random model, a random adapter and two documents serves."""
    config, corpus, adapter = config_of(), tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("adapter")
    (corpus / "moss.md").write_text("# Plants\n\nMoss is green. <script>document.title = 'moss'</script>\n")
    (corpus / "tin.txt").write_text("Tin is a grey metal & melts <b>early</b>.\n")
    config.retrieve.corpus = str(corpus)
    config.serve.slots, config.serve.waiting, config.serve.max_tokens = 4, 36, 1500
    opened = Session(config)
    opened.stop_ids = (2,)  # so that there are long completions too
    lora = LoRAConfig(4, 8.0)
    files = peft_adapter.adapter_files(random_adapter(opened.source.config, lora, opened.mesh), lora, config.model)
    write_files(adapter, files)
    from roserag_jax.serving.models import Models

    engines = {"base": opened.engine(), "adapter": opened.engine(epath.Path(adapter))}
    models = Models(config, opened.tokenizer, engines, open_retriever(config))
    models.warm_up()
    yield models
    assert models.close()


@pytest.fixture(scope="session")
def server_url(served):
    """The address of a running server, which serves `served`."""
    from roserag_jax.serving.server import Server, listen, url_of

    listening = listen("127.0.0.1", 0)
    with Server(served, listening):
        yield url_of(listening)
