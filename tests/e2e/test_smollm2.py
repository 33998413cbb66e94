"""A real model, SmolLM2-135M-Instruct: the split's logits and tokens against Hugging Face's on the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastsplit.models import open_model

pytest.importorskip("transformers")
from split import load_hf, relative_error, split

from demo.smollm2 import gguf_path, model_dir

PROMPTS = [
    "Why is the sky blue?",
    "Write a short poem about a lighthouse keeper who counts the waves.",
    "def fibonacci(n):\n    ",
]
NEW_TOKENS = 64
FP32_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def directory() -> Path:
    try:
        gguf_path()
    except Exception as error:
        pytest.skip(f"the model's package is not installed: {error}")
    return model_dir()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_logits_and_64_greedy_tokens_are_hf(directory: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    reference = load_hf(directory)
    model = open_model(str(directory))
    for prompt in PROMPTS:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = ids["input_ids"][0]
        with torch.inference_mode():
            logits = reference(ids[None]).logits[0]
            tokens = reference.generate(
                ids[None],
                attention_mask=torch.ones_like(ids)[None],
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
            )[0, len(ids) :].tolist()
        for plan in ("per-op", "batched"):
            with split(model, f"unix://{tmp_path}/s.sock", plan=plan) as (runner, channel):
                ours = runner.forward(ids, runner.new_cache(len(ids)), all_logits=True)
                error = relative_error(ours, logits)
                print(f"{plan}: {len(ids)} tokens, max |difference| / max |logit| = {error:.2e}")
                assert error <= FP32_TOLERANCE
                # min_new_tokens keeps HF from the end-of-sequence token; ours has to be kept from it in the same way
                assert _greedy_without_eos(runner, ids) == tokens
                # the ids of two prompts and of all new tokens but the last, and nothing else
                assert channel.stats.bytes_copied == 8 * (2 * len(ids) + NEW_TOKENS - 1)


def _greedy_without_eos(runner: object, ids: torch.Tensor) -> list[int]:
    from fastsplit.runner import Runner

    assert isinstance(runner, Runner)
    cache = runner.new_cache(len(ids) + NEW_TOKENS)
    tokens: list[int] = []
    step = ids
    for _ in range(NEW_TOKENS):
        logits = runner.forward(step, cache)[-1].float()
        logits[list(runner.config.eos_token_ids)] = -torch.inf
        tokens.append(int(logits.argmax()))
        step = torch.tensor(tokens[-1:])
    return tokens
