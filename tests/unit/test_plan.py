"""Plans: what follows from their texts, and which plan runs for which model."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fastsplit.errors import SettingError
from fastsplit.models import PRESETS, ModelConfig
from fastsplit.split.blocks import row_blocks
from fastsplit.split.contract import Shapes, traffic
from fastsplit.split.plan import (
    INTERNAL,
    PLANS,
    STEP_LISTS,
    STEPS,
    TEE_STEPS,
    Call,
    Local,
    Plan,
    choose_plan,
    signature,
)
from fastsplit.tee.program import Interpreter
from fastsplit.tee.runner import Runner

TINYLLAMA = PRESETS["tinyllama-1.1b"]
FORMS = {
    f"{plan.name}, {what}": form
    for plan in PLANS.values()
    for what, form in (
        ("as it is", plan),
        ("at home", plan.with_embedding),
        ("exact", plan.exact or plan),
        ("exact, at home", (plan.exact or plan).with_embedding),
    )
}
PRODUCTS = ("q", "k", "v", "scores", "values", "o", "gate", "up", "down")
OF_STEP = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def calls_of(form: Plan, layers: int, **kind: bool) -> list[Call]:
    return [stage for stage in form.schedule(layers, **kind) if isinstance(stage, Call)]


@pytest.mark.parametrize(
    ("name", "form", "per_layer", "once"),
    [
        ("per-op", "as it is", 9, 2),
        ("batched", "as it is", 6, 2),
        ("fused", "as it is", 5, 2),
        ("folded", "as it is", 3, 1),
        ("minimal", "as it is", 2, 1),
        ("tee-attention", "as it is", 2, 1),
        ("tee-attention", "at home", 2, 1),
        ("tee-attention", "exact", 4, 2),
        ("tee-attention", "exact, at home", 4, 1),
    ],
)
def test_calls(name: str, form: str, per_layer: int, once: int) -> None:
    plan = FORMS[f"{name}, {form}"]
    assert plan.call_counts == (per_layer, once)
    for layers in (1, 2, 3, 22):
        assert plan.calls(layers) == len(calls_of(plan, layers, selects=True)) == per_layer * layers + once


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("selects", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_plan_has_every_step_once_a_layer_in_the_order_of_a_pass(form: str, selects: bool, layers: int) -> None:
    """The products are the executor's, or in tee-attention the TEE's; softmax and activation are always the TEE's."""
    plan = FORMS[form]
    seen: list[tuple[int, str]] = []
    for stage in plan.schedule(layers, selects=selects):
        layer = stage.layer
        for step in (stage.step,) if isinstance(stage, Local) else stage.steps:
            if step == "attention":
                seen += [(layer, "scores"), (layer, "softmax"), (layer, "values")]
                continue
            seen += [(layer, each) for each in OF_STEP.get(step, (step,)) if each in (*PRODUCTS, "softmax", "act")]
            if step == "down" and isinstance(stage, Call):
                layer += 1
    order = ("q", "k", "v", "scores", "softmax", "values", "o", "gate", "up", "act", "down")
    assert seen == [(layer, step) for layer in range(layers) for step in order]
    with_embedding = [stage.step for stage in plan.schedule(layers) if isinstance(stage, Local)]
    assert {"softmax", "attention"} & set(with_embedding) and "act" in with_embedding


@pytest.mark.parametrize("selects", [False, True])
@pytest.mark.parametrize("wants_logits", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_call_carries_what_was_made_before(form: str, wants_logits: bool, selects: bool) -> None:
    """Nothing is sent that the TEE does not have, and nothing comes back that is not used."""
    makes = {
        "embed": ["x"],
        "norm": ["normed"],
        "rope": [],
        "select": [],
        "store": [],
        "attention": ["attended"],
        "softmax": ["weights"],
        "act": ["gated"],
        "add": [],
    }
    have = {"ids", "cos", "sin", "scale", "selected"}
    for stage in FORMS[form].schedule(3, wants_logits=wants_logits, selects=selects):
        if isinstance(stage, Local):
            have.update(makes[stage.step])
            if stage.step == "select" and "qk" in have:
                have = have - {"qk"} | {"q", "k"}
            continue
        assert all(name in have or (name == "k" and "qk" in have) for name in stage.inputs), stage
        assert not set(stage.outputs) & set(INTERNAL)
        have.update(stage.outputs)
    assert ("logits" in have) == wants_logits


@pytest.mark.parametrize("form", FORMS)
def test_a_chunk_without_logits_ends_when_keys_and_values_are_stored(form: str) -> None:
    plan = FORMS[form]
    stages = plan.schedule(2, wants_logits=False)
    whole = plan.schedule(2)
    steps = [step for stage in stages for step in ((stage.step,) if isinstance(stage, Local) else stage.steps)]
    stores = ("store",) if plan.cache_in_tee else ("store_k", "store_v")
    assert all(steps.count(step) == 2 for step in stores)
    assert steps[-1] in (*stores, "scale_kv", "scale_v") and "lm_head" not in steps
    assert len(stages) < len(whole)
    shared = next((index for index, (one, other) in enumerate(zip(stages, whole)) if one != other), len(stages))
    assert shared >= len(whole) // 3, "until the last layer it is the same pass"


def test_what_is_selected_and_where() -> None:
    """One row goes on in the last layer alone, on each side that has rows."""
    for plan in FORMS.values():
        stages = plan.schedule(3, selects=True)
        locals_ = [stage.layer for stage in stages if isinstance(stage, Local) and stage.step == "select"]
        remote = [stage.end_layer for stage in stages if isinstance(stage, Call) and "select" in stage.steps]
        assert locals_ == [2] and remote == ([2] if plan.folds else [])
        assert "select" not in [step for stage in plan.schedule(3) if isinstance(stage, Call) for step in stage.steps]


def test_a_signature() -> None:
    assert signature(("store_k", "scale_v", "select", "scores"), joined=True) == (
        ("qk", "scale", "selected"),
        ("scores",),
    )
    assert signature(("store_k", "scale_v", "select", "scores"), joined=False)[0] == ("q", "k", "scale", "selected")
    assert signature(("embed", "norm", "qkv", "store_v"), joined=True) == (("ids",), ("x", "qk"))
    assert signature(("down", "add", "norm", "qkv", "store_v", "rope", "store_k"), joined=True) == (("gated",), ("x",))
    assert signature(("scale_kv",), joined=True) == (("scale",), ())


def test_the_lists_of_steps_are_those_of_the_plans() -> None:
    assert len(STEP_LISTS) == 37
    assert all(text == " ".join(steps) and set(steps) <= set(STEPS) for text, steps in STEP_LISTS.items())
    assert {step for steps in STEP_LISTS.values() for step in steps} == set(STEPS), "no step without a plan"


def test_where_what_is() -> None:
    assert [name for name, plan in PLANS.items() if plan.folds] == ["folded", "minimal", "tee-attention"]
    assert [name for name, plan in PLANS.items() if not plan.verifiable] == ["minimal"]
    assert [name for name, plan in PLANS.items() if plan.cache_in_tee] == ["tee-attention"]
    assert [name for name, plan in FORMS.items() if plan.embeds_in_tee] == [
        "tee-attention, at home",
        "tee-attention, exact, at home",
    ]


def test_what_the_executor_sees() -> None:
    """With attention in the TEE it sees no scores and no weights; with the embedding there no ids."""
    for name, plan in FORMS.items():
        seen = set(plan.executor_sees)
        assert ("scores" in seen, "weights" in seen) == (not plan.cache_in_tee,) * 2, name
        assert ("ids" in seen) == (not plan.embeds_in_tee), name
        assert {"gated", "logits"} <= seen, name


POST = "gemma2: norms after attention and MLP stand between what folding puts together"
HALF = "float16: the residual stream may leave its range"
NORMS = "qwen3: norms of q and k come between the products"
BIASES = "llama: biases of q and k come between the products"
CHOICES: list[tuple[dict[str, Any], tuple[str, ...], dict[str, tuple[str, str]]]] = [
    ({}, ("float32", "float32"), {"auto": ("folded", ""), "folded": ("folded", ""), "minimal": ("minimal", "")}),
    ({}, ("bfloat16", "float32"), {"auto": ("folded", ""), "minimal": ("minimal", "")}),
    ({}, ("float16", "float32"), {"auto": ("fused", HALF), "folded": ("fused", HALF), "minimal": ("fused", HALF)}),
    ({}, ("float32", "float16"), {"auto": ("fused", HALF), "folded": ("fused", HALF), "minimal": ("fused", HALF)}),
    ({"attention_bias": True}, ("float32",), {"auto": ("folded", ""), "minimal": ("folded", BIASES)}),
    ({"output_bias": True, "mlp_bias": True}, ("float32",), {"auto": ("folded", ""), "minimal": ("minimal", "")}),
    (
        {"model_type": "qwen3", "qk_norm": True},
        ("float32",),
        {"auto": ("folded", ""), "folded": ("folded", ""), "minimal": ("folded", NORMS)},
    ),
    (
        {"model_type": "gemma2", "post_norms": True, "qk_norm": True},
        ("float16",),
        {"auto": ("fused", POST), "folded": ("fused", POST), "minimal": ("fused", POST)},
    ),
    ({"attention_softcap": 50.0, "logits_softcap": 30.0}, ("float32",), {"minimal": ("minimal", "")}),
    ({"residual_multiplier": 0.5, "embedding_multiplier": 2.0}, ("float32",), {"minimal": ("minimal", "")}),
]


@pytest.mark.parametrize(("changes", "dtypes", "expected"), CHOICES)
def test_the_plan_follows_from_model_and_dtypes(
    changes: dict[str, Any], dtypes: tuple[str, ...], expected: dict[str, tuple[str, str]]
) -> None:
    config: ModelConfig = replace(TINYLLAMA, **changes)
    for wanted, chosen in expected.items():
        assert choose_plan(wanted, config, dtypes) == chosen
    if "minimal" in expected:
        assert choose_plan("linear", config, dtypes) == expected["minimal"], "its name of before"
    for wanted in ("per-op", "batched", "fused", "tee-attention"):
        assert choose_plan(wanted, config, dtypes) == (wanted, ""), "any model can have these"


@pytest.mark.parametrize("wanted", ["", "Auto", "best"])
def test_a_plan_that_there_is_not(wanted: str) -> None:
    with pytest.raises(ValueError, match=f"plan '{wanted}', expected one of auto, {', '.join(PLANS)}"):
        choose_plan(wanted, TINYLLAMA, ("float32",))


def test_the_form_follows_from_model_dtypes_and_weights() -> None:
    plan = PLANS["tee-attention"]
    gemma = replace(TINYLLAMA, model_type="gemma2", post_norms=True)
    assert plan.exact is not None
    for config, dtypes, form in (
        (TINYLLAMA, ("float32", "float32"), plan),
        (TINYLLAMA, ("bfloat16", "float32"), plan),
        (TINYLLAMA, ("float16", "float32"), plan.exact),
        (gemma, ("float32", "float32"), plan.exact),
    ):
        assert plan.form(config, dtypes, has_embedding=False) is form
        assert plan.form(config, dtypes, has_embedding=True) is form.with_embedding
    assert PLANS["folded"].form(TINYLLAMA, ("float32",), has_embedding=True) is PLANS["folded"]


def test_two_kinds_of_rotary_embedding_are_rotated_in_the_tee() -> None:
    config = replace(TINYLLAMA, model_type="gemma3_text", local_rope=TINYLLAMA.rope)
    assert choose_plan("minimal", config, ("float32",))[0] == "folded"


# ---- shapes and bytes ------------------------------------------------------------------------------------------------


def test_shapes_follow_from_the_configuration() -> None:
    shapes = Shapes(TINYLLAMA, "bfloat16")

    def shape(value: str, selected: bool = False) -> tuple[int, ...]:
        return shapes.shape(value, 2, 3, selected, row_blocks(3, 60, 20))

    assert shape("x") == shape("normed") == shape("delta") == (2, 3, 2048)
    assert (shape("qk"), shape("q"), shape("k"), shape("v")) == ((2, 3, 36, 64), (2, 3, 32, 64), *[(2, 3, 4, 64)] * 2)
    assert shape("q", True) == (2, 1, 32, 64) and shape("k", True) == (2, 3, 4, 64)
    assert shape("scores") == shape("weights") == (12288,)
    assert (shape("attended"), shape("gate_up"), shape("gated")) == ((2, 3, 2048), (2, 2, 3, 5632), (2, 3, 5632))
    assert (shape("logits", True), shape("ids"), shape("scale"), shape("selected")) == (
        (2, 1, 32000),
        (2, 3),
        (2, 3),
        (2,),
    )
    assert shape("cos") == shape("sin") == (1, 3, 32)
    assert [shapes.dtype(name) for name in ("x", "ids", "scale")] == ["bfloat16", "int64", "float32"]
    (call, *_) = calls_of(PLANS["folded"], 2)
    assert shapes.reply(call, 2, 3, []) == [("bfloat16", (2, 3, 2048)), ("bfloat16", (2, 3, 36, 64))]


def test_tee_attention_moves_less_than_half_the_bytes_of_a_long_prompt() -> None:
    minimal, here = (sum(traffic(TINYLLAMA, PLANS[name], 4, 0, 1024)[1:]) for name in ("minimal", "tee-attention"))
    assert here < 0.5 * minimal


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "1 parts, expected 3 with | between them"),
        ("[embed] | norm [q] | norm | [lm_head]", "4 parts, expected 3"),
        ("[embed] | nrom [qkv] | norm [lm_head]", "'nrom' is no step of the TEE"),
        ("[embed] | norm [qkv softmax] | norm [lm_head]", "'softmax' is no step of the executor"),
        ("[embed] | norm select | norm [lm_head]", "'select' is no step of the TEE"),
        ("embed] | norm | norm [lm_head]", "']' where a call is not open"),
        ("[[embed]] | norm | norm [lm_head]", "'[' where a call is open"),
        ("[embed] | norm [qkv | norm lm_head]", "a call stays open"),
        ("[embed] | norm [qkv] | norm [lm_head", "a call stays open"),
        ("[embed | norm qkv] act | norm [lm_head]", "a call stays open"),
    ],
)
def test_a_text_that_is_no_plan(text: str, error: str) -> None:
    with pytest.raises(SettingError, match=re.escape(f"plan 'mine': {error}")):
        Plan("mine", text)


def test_the_steps_of_the_tee_are_methods_of_the_interpreter() -> None:
    assert all(hasattr(Interpreter, f"_{step}") for step in TEE_STEPS)
    found = {stage.step for form in FORMS.values() for stage in form.schedule(2) if isinstance(stage, Local)}
    assert found == TEE_STEPS


def test_a_plan_that_embeds_in_the_tee_needs_the_trusted_copy() -> None:
    model: Any = SimpleNamespace(dtype="float32", config=PRESETS["tiny"], trusted=None)
    with pytest.raises(SettingError, match="plan 'tee-attention': it looks ids up in the TEE"):
        Runner(model, None, PLANS["tee-attention"].with_embedding)  # type: ignore[arg-type]
