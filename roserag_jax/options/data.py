"""Options of the questions."""

from roserag_jax.options.option import Option
from roserag_jax.rag.layouts import READERS

DATA = {
    "train": Option(
        "synthetic",
        "training questions: a .json or .jsonl file, plain or .gz, "
        "hf://owner/name[@revision][/configuration][:split], 'synthetic', or 'documents': the model writes questions "
        "about retrieve.corpus",
    ),
    "eval": Option(
        "synthetic",
        "held-out questions, named in the same way; with data.train=documents, 'synthetic' is 'documents' too",
    ),
    "format": Option("auto", "layout of both files; auto detects it from the first row", ("auto", *READERS)),
    "language": Option("", "language of the questions, for evaluate.metric: 'de', 'zh' (MLQA) or 'zh_cn' (MKQA), ..."),
    "pairs": Option("", "ready-made pairs, TRL's {prompt, chosen, rejected}, to train on instead of generated ones"),
    "train_rows": Option(
        0, "number of training questions or pairs to use, from the first; 0 is all (synthetic: 200)", at_least=0
    ),
    "eval_rows": Option(
        0, "number of held-out questions to use, from the first; 0 is all (synthetic: 100)", at_least=0
    ),
    "synthetic_seed": Option(0, "seed of the synthetic world and its questions", at_least=0),
    "synthetic_passages": Option(5, "number of passages of a synthetic question", at_least=2),
    "synthetic_missing_gold": Option(
        0.0, "fraction of the synthetic questions that lack a gold passage", at_least=0, at_most=1
    ),
    "synthetic_counterfactual": Option(
        0.0, "fraction of the synthetic questions that have a passage with a wrong answer", at_least=0, at_most=1
    ),
}
