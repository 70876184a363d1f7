"""The study's setting: SmolLM2-135M-Instruct on HotPotQA, five of the ten passages that BM25 finds.

Command:   python -m benchmarks.study --workdir runs/study --train-rows 400 --eval-rows 250 --epochs 1
Hardware:  a CPU with two cores (AVX-512)
Time:      several hours; every row resumes where it stopped
Result:    EM 2.8 -> 14.0 on 250 held-out questions, and every ablation (docs/results.md)
"""

from configs import hotpotqa_smollm2


def get_config():
    config = hotpotqa_smollm2.get_config()  # the same model, machine and files
    config.workdir = "runs/study"
    config.retrieve.k = 10
    config.prompt.passages, config.prompt.max_tokens = 5, 2304  # room for ten passages
    config.generate.guided_samples = 6
    config.generate.max_tokens = config.evaluate.max_tokens = 64
    config.generate.batch, config.evaluate.batch = 10, 16
    return config
