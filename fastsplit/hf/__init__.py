"""The split as a causal LM of transformers: `generate`, with all of its modes, against a GPU side.

    with SplitModelForCausalLM.connect("unix:///tmp/gpu.sock", "models/llama") as model:
        model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=50, num_beams=4)

`model.py`: the model, whose `forward` runs layer by layer (tee/runner.py). `cache.py`: `past_key_values`, with keys and
values on the executor. `inputs.py`: mask, positions, selected rows, distinct sequences. `refused.py`: arguments that a
split model refuses, with reasons. Importing this package imports torch and transformers.
"""

from __future__ import annotations

from .cache import SplitCache
from .model import SplitModelForCausalLM

__all__ = ["SplitCache", "SplitModelForCausalLM"]
