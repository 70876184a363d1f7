"""The study's setting with a model that reads, Qwen2.5-Coder-0.5B-Instruct: HotPotQA, five passages that BM25 finds.

Command:   python -m benchmarks.study --config configs/study_qwen.py --workdir runs/study_qwen (docs/results.md has all)
Hardware:  a CPU with two cores
Time:      estimated at 20 hours on two quiet cores; every row resumes where it stopped
Result:    not run
"""

from configs import study


def get_config():
    config = study.get_config()
    config.model = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    config.workdir = "runs/study_qwen"
    config.retrieve.k, config.prompt.max_tokens = 20, 4096  # room for twenty passages
    config.prompt.order = "best_first"
    return config
