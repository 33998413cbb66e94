"""Plans as data: which steps of a forward pass run on which side, and which of them go in one call.

A plan is a text. Steps in brackets are one call to the executor; steps outside run in the TEE. `|` divides what comes
before the layers, what each layer repeats, and what comes after them; a call may go across it:

    [embed | norm qkv store_v] rope [store_k scale_v scores] softmax [values o add norm gate_up] act [down add | norm
    lm_head]

`schedule` unrolls a plan for a model into calls and the TEE's steps between them. Everything else follows from that:
the number of calls, the tensors that travel and their shapes (contract.py), what a call counts as in the report, what
the executor learns, whether its products can be verified, and the tables in the docs.

A norm in a call is folded: W(norm(x)) = rms(x)^-1 * W diag(g) x. The executor multiplies x by the norm's weight g and
sends x back, and the TEE applies rms(x)^-1 of each row to what came of it.

A new plan is a new entry of `PLANS`.

Rules. A step's name, inputs and outputs are defined in `STEPS` alone. Nothing here uses tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import SettingError
from ..models import ModelConfig

__all__ = [
    "PLANS",
    "PLAN_ALIASES",
    "STEPS",
    "STEP_LISTS",
    "TEE_STEPS",
    "Call",
    "Local",
    "Plan",
    "Stage",
    "Step",
    "choose_plan",
    "crosses",
    "obstacle",
    "signature",
]


class Step(NamedTuple):
    """What a step of the executor does, in names of values (contract.py has their shapes).

    `takes`: what earlier steps of the call made, or else the request carries. `gives`: what it makes; at the call's end
    everything that no later step has taken goes back, except `INTERNAL` values. `kind`: what it counts as in the
    report. `products`: how many matrix products it counts for there.
    """

    takes: tuple[str, ...]
    gives: tuple[str, ...]
    kind: str = ""
    products: int = 0


INTERNAL = ("normed", "rotated")
"""Values that never leave the executor."""

_ORDER = (
    *("ids", "cos", "sin", "x", "normed", "qk", "q", "k", "weights", "v", "attended", "gated"),
    *("scale", "selected"),
)
"""In which order a request carries them."""

STEPS: dict[str, Step] = {
    # before the layers
    "tables": Step(("cos", "sin"), ()),  # the rotary tables of this pass stay for all layers
    "embed": Step(("ids",), ("x",), "embedding", 1),
    "residual": Step(("x",), ()),  # the TEE's x begins the residual stream
    # a norm whose weight is folded into the next product; x stays as the residual stream
    "norm": Step((), ("normed",)),
    # attention; q and k are the two parts of qk
    "q": Step(("normed",), ("q",), "linear", 1),
    "k": Step(("normed",), ("k",), "linear", 1),
    "v": Step(("normed",), ("v",), "linear", 1),
    "qkv": Step(("normed",), ("qk", "v"), "linear", 3),
    "store_v": Step(("v",), ()),  # into the KV cache
    "rope": Step(("qk",), ("rotated",)),
    "store_k": Step(("k",), ()),
    "scale_v": Step(("scale",), ()),  # applies rms(x)^-1, and the bias behind it, to what was stored
    "scale_kv": Step(("scale",), ()),
    "select": Step(("selected",), ()),  # one row of each sequence goes on, of the residual stream and of q
    "scores": Step(("q",), ("scores",), "matmul", 1),
    "values": Step(("weights",), ("attended",), "matmul", 1),
    "o": Step(("attended",), ("delta",), "linear", 1),
    # the residual stream goes on as x + delta
    "add": Step(("delta",), ("x",)),
    # MLP
    "gate": Step(("normed",), ("gate",), "linear", 1),
    "up": Step(("normed",), ("up",), "linear", 1),
    "gate_up": Step(("normed",), ("gate_up",), "linear", 2),
    "down": Step(("gated",), ("delta",), "linear", 1),
    # behind the layers
    "lm_head": Step(("normed",), ("logits",), "lm_head", 1),
}
"""The executor's steps."""

TEE_STEPS = frozenset(("embed", "norm", "rope", "store", "attention", "softmax", "act", "add"))
"""The TEE's steps: methods of tee/program.py. It has `select` besides, which `schedule` inserts."""

_FILLS_CACHE = {
    *("tables", "embed", "residual", "norm", "q", "k", "v", "qkv"),
    *("store_v", "rope", "store_k", "scale_v", "scale_kv", "store"),
}
"""The steps of the last layer that run in a chunk whose logits are not wanted."""


class Call(NamedTuple):
    """One call to the executor."""

    layer: int
    """The layer of its first step; steps behind `down add` belong to the next one."""
    steps: tuple[str, ...]
    text: str
    """The steps as the request names them: with spaces between."""
    inputs: tuple[str, ...]
    """Values that the request carries, in this order. q and k that lie together travel as one tensor, `qk`."""
    outputs: tuple[str, ...]
    """Values that the reply carries, in this order."""
    selected: bool
    """Whether one row of each sequence was selected before this call."""
    kind: str
    """What the call counts as in the report: the kinds of its steps, "+" between different ones."""
    products: int
    """Products of this kind, as the report counts them; 1 for a call of several kinds."""

    @property
    def end_layer(self) -> int:
        """The layer of its last step."""
        return self.layer + crosses(self.steps)


class Local(NamedTuple):
    """A step of the TEE. `nth`: 0 for the first of its name in the layer, 1 for the second; -1 after the layers."""

    layer: int
    step: str
    nth: int


Stage = Call | Local


class Plan:
    """One way to divide a forward pass. Immutable; `schedule` keeps what it has made."""

    def __init__(
        self, name: str, text: str, *, fallback: str = "", with_embedding: str = "", exact: Plan | None = None
    ) -> None:
        """`fallback`: the plan that runs where this one cannot. `with_embedding`: what comes before the layers where
        the TEE has the embedding's weights. `exact`: the form of this plan for models and dtypes where norms cannot be
        folded.

        Raises SettingError for a text that is no plan: other than three parts, brackets that do not match, unknown
        steps.
        """
        self.name = name
        self.text = text
        self.fallback = fallback
        self.exact = exact
        self.with_embedding = Plan(name, f"{with_embedding} |{text.partition('|')[2]}") if with_embedding else self
        self._before, self._layer, self._after = _parsed(name, text)
        self.schedule = functools.lru_cache(64)(self._schedule)
        called = {step for part in text.split("[")[1:] for step in part.partition("]")[0].split()}
        self.folds = "norm" in called
        """Whether norms are folded: the residual stream is on the executor."""
        self.rotates = "rope" in called
        """Whether q and k are rotated on the executor, so that they never leave it."""
        self.embeds_in_tee = "embed" not in called
        """Whether the TEE looks the embeddings up."""
        self.cache_in_tee = "scores" not in called
        """Whether keys and values are in the TEE; else they are on the executor."""

    def __repr__(self) -> str:
        return f"Plan({self.name!r}, {self.text!r})"

    @property
    def verifiable(self) -> bool:
        """Whether the TEE can check every product: it sees the input and the output of each, or of a chain of linear
        products (v, values, o). Scores of a q and a k that it never sees cannot be checked."""
        return not self.rotates

    @property
    def executor_sees(self) -> tuple[str, ...]:
        """The values that the executor sees, in the order of a pass: what it is sent, and what it makes."""
        names: dict[str, None] = {}
        for stage in self.schedule(2):
            if isinstance(stage, Call):
                names.update(
                    dict.fromkeys((*stage.inputs, *(name for step in stage.steps for name in STEPS[step].gives)))
                )
        return tuple(names)

    def why_not(self, config: ModelConfig, dtypes: Sequence[str]) -> str:
        """Why the plan cannot run for a model with these dtypes of executor and link; "" if it can."""
        return obstacle(config, dtypes, folds=self.folds, rotates=self.rotates)

    def form(self, config: ModelConfig, dtypes: Sequence[str], *, has_embedding: bool) -> Plan:
        """The form of the plan that runs: `exact` if norms cannot be folded; of it `with_embedding` with
        `has_embedding`."""
        plan = self.exact if self.exact is not None and self.why_not(config, dtypes) else self
        return plan.with_embedding if has_embedding else plan

    def calls(self, layers: int) -> int:
        """Calls of a forward pass."""
        return sum(isinstance(stage, Call) for stage in self.schedule(layers))

    @property
    def contents(self) -> list[str]:
        """What goes in each call of a layer: the products, "+" between them."""
        calls = (stage for stage in self.schedule(3) if isinstance(stage, Call) and stage.layer == 1)
        return ["+".join(step for step in call.steps if STEPS[step].products) for call in calls]

    @property
    def call_counts(self) -> tuple[int, int]:
        """Calls for each layer, and calls besides."""
        one, two = self.calls(1), self.calls(2)
        return two - one, 2 * one - two

    def _schedule(self, layers: int, *, wants_logits: bool = True, selects: bool = False) -> tuple[Stage, ...]:
        """The stages of one chunk in order.

        `wants_logits`: False for a chunk that ends as soon as the last layer's keys and values are stored. `selects`:
        whether one row of each sequence goes on from the last layer's scores: no later layer reads the other rows.
        """
        stages: list[Stage] = []
        steps: list[str] | None = None  # of the call that is open
        first = 0  # its layer
        selected = waiting = False  # waiting: the residual stream on the executor has all rows still
        joined = "qkv" in self._layer
        for layer, token, index in self._tokens(layers, wants_logits):
            final = layer == layers - 1 and selects and wants_logits
            if token == "[":
                steps, first = [], layer
            elif token == "]":
                assert steps is not None
                if steps:
                    stages.append(_call(first, tuple(steps), selected, joined and not selected))
                if final and "rope" in steps:
                    stages.append(Local(layer, "select", 0))
                    selected = True
                steps = None
            elif steps is None:
                stages.append(Local(layer, token, index))
                if final and token == "rope":
                    stages.append(Local(layer, "select", 0))
                    selected, waiting = True, self.folds
            else:
                if final and (token == "scores" or (waiting and token == "o")):
                    if self.folds:
                        steps.append("select")
                    waiting = False
                steps.append(token)
        return tuple(stages)

    def _tokens(self, layers: int, wants_logits: bool) -> Iterator[tuple[int, str, int]]:
        """(layer, token, which one of its name within the layer) of the whole pass."""
        for token in self._before:
            yield 0, token, 0
        for layer in range(layers):
            seen: dict[str, int] = {}
            fills_only = layer == layers - 1 and not wants_logits
            for token in self._layer:
                index = seen[token] = seen.get(token, -1) + 1
                if not fills_only or token in "[]" or (token in _FILLS_CACHE and not (token == "norm" and index)):
                    yield layer, token, index
        if wants_logits:
            for token in self._after:
                yield layers - 1, token, -1


def obstacle(config: ModelConfig, dtypes: Sequence[str], *, folds: bool, rotates: bool) -> str:
    """Why norms cannot be folded, or q and k not be rotated on the executor, for a model with these dtypes of executor
    and link; "" if they can."""
    if folds and config.post_norms:
        return f"{config.model_type}: norms after attention and MLP stand between what folding puts together"
    if folds and "float16" in dtypes:
        return "float16: the residual stream may leave its range"
    if rotates and (config.qk_norm or config.attention_bias):
        what = "norms" if config.qk_norm else "biases"
        return f"{config.model_type}: {what} of q and k come between the products"
    if rotates and config.local_rope is not None:
        return f"{config.model_type}: layers have two kinds of rotary embedding"
    return ""


def crosses(steps: Sequence[str]) -> bool:
    """Whether the last steps of a call belong to the layer after that of its first step."""
    return "down" in steps and "qkv" in steps


def _parsed(name: str, text: str) -> list[tuple[str, ...]]:
    """The tokens of what comes before the layers, of a layer, and of what comes after them. Raises SettingError."""
    parts = [tuple(part.replace("[", " [ ").replace("]", " ] ").split()) for part in text.split("|")]
    if len(parts) != 3:
        raise SettingError(f"plan {name!r}: {len(parts)} parts, expected 3 with | between them")
    is_open = False
    ends = []
    for part in parts:
        for token in part:
            if token in ("[", "]"):
                if is_open == (token == "["):
                    raise SettingError(f"plan {name!r}: {token!r} where a call is {'' if is_open else 'not '}open")
                is_open = not is_open
            elif token not in (STEPS if is_open else TEE_STEPS):
                side = "executor" if is_open else "TEE"
                raise SettingError(f"plan {name!r}: {token!r} is no step of the {side}")
        ends.append(is_open)
    if ends[0] != ends[1] or ends[2]:
        raise SettingError(f"plan {name!r}: a call stays open, expected a ']' within the layer or behind the layers")
    return parts


@functools.cache
def signature(steps: tuple[str, ...], joined: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The values that a request with these steps carries, and those that its reply carries, in order.

    `joined`: q and k, where both are asked for, travel as one tensor `qk`.
    """
    inputs: set[str] = set()
    made: dict[str, None] = {}
    for step in steps:
        for name in STEPS[step].takes:
            if name in made:
                del made[name]
            elif name not in ("q", "k") or "rotated" not in made:
                inputs.add(name)
        made.update(dict.fromkeys(STEPS[step].gives))
    if "normed" in inputs and "norm" in steps:
        inputs.remove("normed")
    if joined and {"q", "k"} <= inputs:
        inputs = inputs - {"q", "k"} | {"qk"}
    return tuple(sorted(inputs, key=_ORDER.index)), tuple(name for name in made if name not in INTERNAL)


def _call(layer: int, steps: tuple[str, ...], selected: bool, joined: bool) -> Call:
    kinds = list(dict.fromkeys(STEPS[step].kind for step in steps if STEPS[step].kind))
    products = sum(STEPS[step].products for step in steps) if len(kinds) < 2 else 1
    inputs, outputs = signature(steps, joined)
    return Call(layer, steps, " ".join(steps), inputs, outputs, selected, "+".join(kinds) or "matmul", products)


PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan(
            "per-op",
            "[embed] | norm [q] [k] [v] rope [store_k scores] softmax [store_v values] [o] add"
            " norm [gate] [up] act [down] add | norm [lm_head]",
        ),
        Plan(
            "batched",
            "[embed] | norm [qkv] rope [store_k scores] softmax [store_v values] [o] add"
            " norm [gate_up] act [down] add | norm [lm_head]",
        ),
        Plan(
            "fused",
            "[embed] | norm [qkv store_v] rope [store_k scores] softmax [values o] add"
            " norm [gate_up] act [down] add | norm [lm_head]",
        ),
        Plan(
            "folded",
            "[embed | norm qkv store_v] rope [store_k scale_v scores] softmax [values o add norm gate_up] act"
            " [down add | norm lm_head]",
            fallback="fused",
        ),
        Plan(
            "minimal",
            "[embed tables | norm qkv store_v rope store_k scores] softmax [scale_kv values o add norm gate_up] act"
            " [down add | norm lm_head]",
            fallback="folded",
        ),
        Plan(
            "tee-attention",
            "[embed | norm qkv] rope store attention [o add norm gate_up] act [down add | norm lm_head]",
            with_embedding="embed [residual",
            exact=Plan(
                "tee-attention",
                "[embed] | norm [qkv] rope store attention [o] add norm [gate_up] act [down] add | norm [lm_head]",
                with_embedding="embed",
            ),
        ),
    )
}
"""Name -> plan. All of them give the same logits."""

PLAN_ALIASES = {"linear": "minimal"}
"""Old name -> current name."""


def _step_lists() -> dict[str, tuple[str, ...]]:
    found = {}
    for plan in PLANS.values():
        for form in (plan, plan.exact or plan):
            for each in (form, form.with_embedding):
                for layers in (1, 2, 3):
                    for wants_logits in (True, False):
                        for selects in (True, False):
                            for stage in each.schedule(layers, wants_logits=wants_logits, selects=selects):
                                if isinstance(stage, Call):
                                    found[stage.text] = stage.steps
    return found


STEP_LISTS = _step_lists()
"""Every list of steps that occurs in some plan, by its text. An executor runs these and no others."""


def choose_plan(wanted: str, config: ModelConfig, dtypes: Sequence[str]) -> tuple[str, str]:
    """The name of the plan that runs for `wanted` (a plan, an alias, or "auto"), and why it is not
    `wanted` ("" if it is).

    `dtypes`: those of executor and link. Raises SettingError for a name that is no plan.
    """
    name = PLAN_ALIASES.get(wanted, wanted)
    if name not in PLANS and name != "auto":
        raise SettingError(f"plan {wanted!r}, expected one of auto, {', '.join(PLANS)}")
    plan = PLANS["folded" if name == "auto" else name]
    first_reason = ""
    while plan.exact is None and (reason := plan.why_not(config, dtypes)):
        first_reason = first_reason or reason
        plan = PLANS[plan.fallback]
    return plan.name, first_reason
