"""What each plan has to move: calls and bytes of a prefill and of the decode step after it.

    python -m benches.counts                            22 and 30 layers, prefill of 1024, float32: at once
    python -m benches.counts --prefill 200 --dtype bfloat16 --model tinyllama-1.1b

Nothing is run: calls and bytes of all requests' and replies' tensors are those of `fastsplit.split.contract.traffic`,
for one sequence in one piece, the last row's logits. tests/e2e/test_counts.py compares that formula with what a channel
counts.
"""

from __future__ import annotations

import argparse
import sys

import torch

from fastsplit.models import DTYPES, PRESETS, ModelConfig
from fastsplit.split.contract import traffic
from fastsplit.split.plan import PLANS

from .environment import add_output, describe, keep_whole, save

__all__ = ["MODELS", "main"]

SMOLLM2 = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
MODELS = {"tinyllama-1.1b": PRESETS["tinyllama-1.1b"], "smollm2-135m": SMOLLM2}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benches.counts", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--plan", nargs="+", default=list(PLANS), choices=PLANS)
    parser.add_argument("--prefill", type=int, default=1024, metavar="N", help="tokens (default: 1024)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    add_output(parser, "counts.json")
    args = parser.parse_args(argv)
    keep_whole(parser, args, ("model", "plan"), [args.output])
    itemsize = getattr(torch, args.dtype).itemsize
    rows = []
    print(f"{'model':<16}{'plan':<15}{'pass':<9}{'calls':>6}{'sent MB':>12}{'received MB':>13}")
    for name in dict.fromkeys(args.model):
        for plan in dict.fromkeys(args.plan):
            form = PLANS[plan].form(MODELS[name], (args.dtype,), has_embedding=False)
            for what, start, new in (("prefill", 0, args.prefill), ("decode", args.prefill, 1)):
                calls, sent, received = traffic(MODELS[name], form, itemsize, start, new)
                print(f"{name:<16}{plan:<15}{what:<9}{calls:>6}{sent / 1e6:>12.3f}{received / 1e6:>13.3f}")
                row = {"model": name, "layers": MODELS[name].num_hidden_layers, "plan": plan, "pass": what}
                rows.append({**row, "start": start, "rows": new, "calls": calls, "sent": sent, "received": received})
    environment = describe(["python", "-m", "benches.counts", *argv])
    options = {"model": args.model, "prefill": args.prefill, "dtype": args.dtype}
    print(save({"environment": environment, "options": options, "counts": rows}, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
