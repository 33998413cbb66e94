"""How precise the split is: SmolLM2-135M's logits in each plan and dtype, beside what Hugging Face's model loses there.

    python -m benches.precision [--output JSON]         about two minutes on two cores

What the numbers are. max |difference| / max |logit| against HF's eager model in fp32, over all rows of three prompts.
The dtype is the executor's, the wire's and the TEE's; "HF" is the same model of HF's in that dtype: what a column can
be expected to lose. A row's name is the plan that was asked for; where another one ran, the table says which.

--casts: float32 on both sides, and a cast on the link alone (a unix socket without shared memory), over the first
512 tokens of this project's licence. Beside the error, how many of the rows' most likely tokens are HF's.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastsplit
from demo.smollm2 import model_dir
from fastsplit.executor.service import Executor
from fastsplit.models import DTYPES, open_model
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner

from .environment import ROOT, add_output, describe, save
from .splits import PLAN_NAMES

__all__ = ["main"]

PROMPTS = (
    "Why is the sky blue?",
    "Write a short poem about a lighthouse keeper who counts the waves.",
    "def fibonacci(n):\n    ",
)
_CASTS = (None, "float16", "bfloat16")
_CAST_TOKENS = 512


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_output(parser, "precision.json")
    parser.add_argument("--casts", action="store_true", help="casts on the link alone, instead of dtypes")
    args = parser.parse_args(argv)
    environment = describe(["python", "-m", "benches.precision", *(sys.argv[1:] if argv is None else argv)])
    directory = model_dir()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if args.casts:
        is_default = args.output == parser.get_default("output")
        output = args.output.with_name("precision-casts.json") if is_default else args.output
        with torch.inference_mode():
            _measure_casts(directory, tokenizer, environment, output)
        return
    prompts = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
    with torch.inference_mode():
        reference = _hf(directory, "float32", prompts)
        errors: dict[str, dict[str, float]] = {"HF": {}, **{plan: {} for plan in PLAN_NAMES}}
        ran: dict[str, dict[str, str]] = {plan: {} for plan in PLAN_NAMES}
        for dtype in DTYPES:
            errors["HF"][dtype] = _error(_hf(directory, dtype, prompts), reference)
            with _runners(directory, dtype) as make:
                for plan in PLAN_NAMES:
                    runner = make(plan)
                    errors[plan][dtype] = _error([_forward(runner, ids) for ids in prompts], reference)
                    ran[plan][dtype] = runner.plan
    result = {"environment": environment, "prompts": PROMPTS, "errors": errors, "plans_that_ran": ran}
    for plan, row in errors.items():
        print(plan, {dtype: f"{error:.1e}" for dtype, error in row.items()}, ran.get(plan, ""))
    print(save(result, args.output))


def _measure_casts(directory: Path, tokenizer: Any, environment: dict[str, Any], output: Path) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :_CAST_TOKENS]
    reference = _hf(directory, "float32", [ids])
    tokens = reference[0].argmax(-1)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    with _runners(directory, "float32", "?shm=off") as make:
        for plan in PLAN_NAMES:
            found = rows[plan] = {}
            for cast in _CASTS:
                logits = _forward(make(plan, cast), ids)
                same = int((logits.argmax(-1) == tokens).sum())
                found[str(cast)] = {"error": _error([logits], reference), "same_tokens": same, "rows": tokens.numel()}
            print(
                plan,
                {cast: f"{one['error']:.1e} ({one['same_tokens']} of {one['rows']})" for cast, one in found.items()},
            )
    print(save({"environment": environment, "casts": rows}, output))


def _hf(directory: Path, dtype: str, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    return [model(ids).logits.float() for ids in prompts]


@contextlib.contextmanager
def _runners(directory: Path, dtype: str, query: str = "") -> Iterator[Any]:
    """(plan, cast) -> a Runner, both sides in this process. `query`: of the URI."""
    model = open_model(str(directory))
    executor = Executor(model, dtype=dtype)
    with (
        tempfile.TemporaryDirectory() as folder,
        fastsplit.Server(f"unix://{folder}/s", executor.handlers, arrays="torch") as server,
        fastsplit.connect(server.uri + query, arrays="torch") as channel,
    ):
        remote = RemoteModel.fetch(channel, model)
        yield lambda plan, cast=None: Runner(remote, channel, plan, cast=cast)


def _forward(runner: Runner, ids: torch.Tensor) -> torch.Tensor:
    with runner.new_cache(1, ids.shape[1]) as cache:
        return runner.forward(ids, cache, keep="all")


def _error(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Over all prompts: max |difference| / max |logit|."""
    most = max(float(logits.abs().max()) for logits in reference)
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, reference)) / most


if __name__ == "__main__":
    main()
