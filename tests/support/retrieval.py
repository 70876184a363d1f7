"""Small random encoders of the BERT family and ColBERT checkpoints, with the torch models that they were made by."""

import json

import pytest
from conftest import copy_folder


def word_pieces() -> list[str]:
    """A vocabulary of BERT's kind: markers, punctuation, letters and pieces of made-up words."""
    signs = [chr(i) for i in range(33, 127) if not chr(i).isalnum()]
    pieces = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"]
    letters = [chr(i) for i in range(97, 123)] + list("0123456789")
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*special, *signs, *letters, *(f"##{x}" for x in letters), *pieces, *(f"##{x}" for x in pieces)]


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """A function: the folder of a small random encoder with its tokenizer, and its torch model."""
    torch = pytest.importorskip("torch")
    import transformers

    made = {}

    def make(family="bert", **changes):
        key = (family, *sorted(changes.items()))
        if key not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(family)
            (folder / "vocab.txt").write_text("\n".join(word_pieces()) + "\n")
            transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
            sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56}
            config = transformers.AutoConfig.for_model(
                family, vocab_size=len(word_pieces()), max_position_embeddings=96, **sizes, **changes
            )
            model = transformers.AutoModel.from_config(config, attn_implementation="eager", add_pooling_layer=False)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            model.eval().save_pretrained(folder)
            made[key] = (folder, model)
        return made[key]

    return make


@pytest.fixture(scope="session")
def colbert_folder(bert_folder, tmp_path_factory):
    """The folder of a small random ColBERT checkpoint, its torch model and its projection [24, D]."""
    import torch
    from safetensors.numpy import save_file

    plain, model = bert_folder()
    projection = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)).numpy()
    folder = copy_folder(plain, tmp_path_factory.mktemp("colbert") / "hub", config={"architectures": ["HF_ColBERT"]})
    tensors = {f"bert.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    save_file({**tensors, "linear.weight": projection}, folder / "model.safetensors")
    (folder / "artifact.metadata").write_text(json.dumps({"query_maxlen": 16, "doc_maxlen": 40}))
    return folder, model, projection
