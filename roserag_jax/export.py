"""Merge the adapter into the base model and write a Hugging Face folder that transformers (4 and 5) and vLLM load.

    python -m roserag_jax.export --config configs/quickstart.py [--config.export.folder=FOLDER]

Writes `merged/` in the workdir, or FOLDER: the weights with the workdir's adapter (or `config.adapter`) merged in, the
configuration and the tokenizer. The weights are the model's own, also where `config.base_dtype` keeps those of runs in
eight bits.
"""

import copy
import json
import shutil
from pathlib import Path

from roserag_jax import cli
from roserag_jax.errors import UserError
from roserag_jax.hub import merged_export
from roserag_jax.hub.tokenizer import tokenizer_path
from roserag_jax.session import Session, adapter_folder
from roserag_jax.workdir import Workdir, is_remote, resolve_path

ORIGIN = "merged_from.json"  # names base, adapter and the files beside it, which may be replaced


def run(config) -> None:
    """The command."""
    original = copy.deepcopy(config)
    original.base_dtype = ""  # the adapter's digits would be rounded away in weights of eight bits
    workdir, session = Workdir(config.workdir), Session(original)
    target = resolve_path(config.export.folder) if config.export.folder else workdir / "merged"
    if is_remote(target):
        raise UserError(f"config.export.folder: {target} is not local; name a local folder, and copy that.")
    folder = Path(target)
    _check_replaceable(folder)
    with workdir.lock():
        adapter = adapter_folder(config, workdir)
        # Built beside its place and then renamed, so that a half-written model is never found there.
        building = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        names = config.model, config.tokenizer, config.revision or None
        merged_export.save_weights(session.model(adapter), building)
        merged_export.save_config(session.source, config.dtype, building)
        merged_export.save_generation_config(session.source, session.stop_ids, session.pad_id, building)
        merged_export.save_tokenizer(tokenizer_path(*names), building)
        files = sorted(file.name for file in building.iterdir())
        origin = {"base": config.model, "adapter": str(adapter), "files": files}
        (building / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        print(f"Wrote {folder} ({size / 1e6:.0f} MB in {session.dtype}): base {config.model} with {adapter} merged in.")
        print(f"Next: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}), or `vllm serve {folder}`.")


def _check_replaceable(folder: Path) -> None:
    """Raise a UserError for a folder that is no earlier export, or holds files of the user's besides."""
    if not folder.exists():
        return
    try:
        made = {ORIGIN, *json.loads((folder / ORIGIN).read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} exists and was not made by this command; name another config.export.folder."
        ) from None
    if theirs := sorted({file.name for file in folder.iterdir()} - made):
        raise UserError(
            f"{folder} holds what this command did not write ({', '.join(theirs[:3])}): move that away, or name "
            "another config.export.folder."
        )


if __name__ == "__main__":
    cli.main(run, __doc__, alone=True, resumes=False)
