"""The plans as Markdown tables, for docs/architecture.md; a test compares them.

Rules. Everything in them follows from plan.py.
"""

from __future__ import annotations

from .plan import PLANS, STEPS, Call, Plan

__all__ = ["SEEN", "plan_table", "seen_table"]

_LETTERS = {
    **dict.fromkeys(("x", "normed", "delta"), "h"),
    **dict.fromkeys(("q", "attended"), "Q"),
    **dict.fromkeys(("k", "v"), "K"),
    **dict.fromkeys(("gate", "up", "gated"), "I"),
    **dict.fromkeys(("scores", "weights"), "S"),
    "qk": "QK",
    "gate_up": "II",
}
"""A value's elements for each row, as a sum of what `plan_table` calls by these letters."""

SEEN = (
    ("token ids", ("ids",), ()),
    ("hidden states", ("x", "normed"), ("x", "normed", "delta")),
    ("q, k and v", (), ("q", "k", "v", "qk")),
    ("q and k, rotated", ("q", "k", "qk"), ("rotated",)),
    ("rotary tables", ("cos", "sin"), ()),
    ("scores", (), ("scores",)),
    ("attention weights", ("weights",), ()),
    ("attention's output", ("attended",), ("attended",)),
    ("gate and up", (), ("gate", "up", "gate_up")),
    ("act(gate) * up", ("gated",), ()),
    ("logits", (), ("logits",)),
)
"""Rows of `seen_table`: label; values that show it when sent; values that show it when the executor makes them."""


def plan_table() -> str:
    """The plans for docs/architecture.md: their texts, and a Markdown table of calls and of what travels."""
    named = {plan.name: plan for plan in PLANS.values()}
    named |= {f"{plan.name}, exact": plan.exact for plan in PLANS.values() if plan.exact is not None}
    width = max(map(len, named))
    lines = ["```", *(f"{name:{width}}  {plan.text}" for name, plan in named.items()), "```", ""]
    lines += ["| plan | calls | to the executor | back | KV cache | residual stream |", "|---|---|---|---|---|---|"]
    for name, plan in named.items():
        per_layer, once = plan.call_counts
        cells = (
            name,
            f"{per_layer}L + {once}",
            *(_moved(plan, direction) for direction in ("inputs", "outputs")),
            "TEE" if plan.cache_in_tee else "executor",
            "executor" if plan.folds else "TEE",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _moved(plan: Plan, direction: str) -> str:
    """The elements that a layer's calls carry for each row."""

    def letters(layers: int) -> str:
        calls = (stage for stage in plan.schedule(layers) if isinstance(stage, Call))
        return "".join(_LETTERS.get(value, "") for call in calls for value in getattr(call, direction))

    three, two = letters(3), letters(2)
    counts = {letter: three.count(letter) - two.count(letter) for letter in "hQKIS"}
    return " + ".join(f"{count if count > 1 else ''}{letter}" for letter, count in counts.items() if count)


def seen_table() -> str:
    """What the executor sees under each plan, as a Markdown table for docs/architecture.md."""
    named = {plan.name: plan for plan in PLANS.values()}
    named |= {
        f"{plan.name}, embedding in the TEE": plan.with_embedding
        for plan in PLANS.values()
        if plan.with_embedding is not plan
    }
    lines = [f"| | {' | '.join(named)} |", "|---" * (len(named) + 1) + "|"]
    rows: dict[str, list[str]] = {what: [] for what, _, _ in SEEN}
    for plan in named.values():
        calls = [stage for stage in plan.schedule(2) if isinstance(stage, Call)]
        inputs = {value for call in calls for value in call.inputs}
        made = {value for call in calls for step in call.steps for value in STEPS[step].gives}
        for what, if_sent, if_made in SEEN:
            found = ("sent" if inputs.intersection(if_sent) else "", "made" if made.intersection(if_made) else "")
            rows[what].append(", ".join(filter(None, found)) or "no")
    rows["every product can be checked"] = ["yes" if plan.verifiable else "no" for plan in named.values()]
    lines += [f"| {what} | {' | '.join(cells)} |" for what, cells in rows.items()]
    return "\n".join(lines)
