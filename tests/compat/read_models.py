"""Read models as transformers 4 does: `read_models.py JOBS RESULTS`, two JSON files; see `test_transformers4.py`."""

import json
import sys

import torch
import transformers


def read(job):
    """Logits of a job's tokens, and the tokens of its text and turns, by the files in its folders."""
    result = {"version": transformers.__version__}
    if "tokens" in job:
        model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], attn_implementation="eager")
        result["dtype"] = str(model.dtype)
        model = model.float()
        if "adapter" in job:
            import peft

            model = peft.PeftModel.from_pretrained(model, job["adapter"])
        with torch.no_grad():
            result["logits"] = model.eval()(torch.tensor([job["tokens"]])).logits[0].tolist()
    if "text" in job:
        tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"])
        generation = transformers.GenerationConfig.from_pretrained(job["folder"])
        turns = [{"role": "user", "content": job["text"]}]
        result["ids"] = tokenizer(job["text"]).input_ids
        result["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        result["ends"] = generation.eos_token_id
        result["chat"] = tokenizer.apply_chat_template(turns, tokenize=False) if tokenizer.chat_template else None
        if "save" in job:  # as people have them: saved by this version
            tokenizer.save_pretrained(job["save"])
    return result


with open(sys.argv[1]) as jobs, open(sys.argv[2], "w") as results:
    json.dump({name: read(job) for name, job in json.load(jobs).items()}, results)
