"""docs/architecture.md: its diffs apply and work, its tables are the code's, its addresses exist, its words are few."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastsplit
from fastsplit.split.plan import STEPS
from fastsplit.split.tables import SEEN, plan_table, seen_table

ROOT = Path(fastsplit.__file__).parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
NEW_FILE = "/dev/null"


def _hunks() -> list[tuple[str, list[str], list[str]]]:
    """Each hunk of the page: its file, the lines that it finds there, and those that it leaves there. A new file's are
    all of it."""
    found = []
    for block in re.findall(r"^```diff\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        for old, name, body in re.findall(
            r"^--- (\S+)\n\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", block, re.MULTILINE | re.DOTALL
        ):
            assert old in (f"a/{name}", NEW_FILE)
            for hunk in body.split("@@\n")[1:]:
                lines = hunk.splitlines()
                before = [line[1:] for line in lines if line[:1] in " -"]
                after = [line[1:] for line in lines if line[:1] in " +"]
                assert after != before and bool(before) == (old != NEW_FILE)
                found.append((name, before, after))
    return found


def _apply(root: Path, wanted: str) -> None:
    """Applies the hunks of the files that `wanted` matches to a copy of the tree."""
    for name, before, after in _hunks():
        if re.search(wanted, name):
            path = root / name
            text = "".join(f"{line}\n" for line in after)
            if before:
                text = path.read_text().replace("".join(f"{line}\n" for line in before), text, 1)
            path.write_text(text)


def test_diffs_apply() -> None:
    hunks = _hunks()
    assert {name for name, *_ in hunks} == {
        "fastsplit/wire/transport/address.py",
        "fastsplit/wire/options.py",
        "fastsplit/schema/coding.py",
        "fastsplit/wire/codecs.py",
        "fastsplit/schema/dtypes.py",
        "fastsplit/split/plan.py",
        "fastsplit/models/families.py",
        "down_guard.py",
    }
    for name, before, _ in hunks:
        if before:
            assert (ROOT / name).read_text().count("\n".join(before) + "\n") == 1, f"{name}: {before}"


# ---- recipes of a split ----------------------------------------------------------------------------------------------

PROGRAM = """
import dataclasses, json, pathlib, sys, tempfile
import torch, transformers
import fastsplit
from down_guard import DownGuard
from fastsplit.executor.service import Executor
from fastsplit.models import ModelConfig, open_model
from fastsplit.split.plan import PLANS
from fastsplit.split.tables import plan_table
from fastsplit.tee import open_split

torch.set_num_threads(1)
directory = pathlib.Path(tempfile.mkdtemp())
ids = torch.arange(60).view(2, 30)
found = {"tree": fastsplit.__file__, "plans": list(PLANS), "table": plan_table()}

def logits(model, plan, guard=None):
    uri = f"unix://{directory}/{plan}.sock"
    with fastsplit.Server(uri, Executor(model).handlers, arrays="torch"), open_split(
        uri, model, plan=plan, rows=30
    ) as split, torch.inference_mode(), split.runner.new_cache(2) as cache:
        assert split.runner.plan == plan
        split.runner.guard = guard
        prompt = split.runner.forward(ids, cache)
        return torch.cat([prompt, split.runner.forward(torch.tensor([[7], [8]]), cache)], dim=1)

def error(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())

tiny = open_model("random:tiny")
expected = logits(tiny, "per-op")
found["plan"] = error(logits(tiny, "fused-v"), expected)

# the family: granite is the class of transformers that computes the same with these multipliers
sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None,
         "pad_token_id": None}
granite = transformers.GraniteConfig(
    **sizes, attention_multiplier=8**-0.5, embedding_multiplier=3.0, residual_multiplier=1.4 / 2, logits_scaling=1.0
)
torch.manual_seed(0)
theirs = transformers.GraniteForCausalLM(granite).eval()
theirs.save_pretrained(directory / "model")
path = directory / "model" / "config.json"
config = json.loads(path.read_text())
for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"):
    del config[name]
path.write_text(json.dumps({**config, "model_type": "even", "embedding_scale": 3.0, "depth_scale": 1.4}))
even = open_model(str(directory / "model"))
assert even.config.model_type == "even" and ModelConfig.from_hf(even.config.to_hf()) == dataclasses.replace(even.config)
with torch.inference_mode():
    more = torch.cat([ids, torch.tensor([[7], [8]])], dim=1)
    expected_even = theirs(more).logits[:, -2:]
    found["family"] = {plan: error(logits(even, plan), expected_even) for plan in PLANS}

guard = DownGuard(tiny)
found["guard"] = error(logits(tiny, "batched", guard=guard), expected)

class Liar(DownGuard):
    def after(self, call, chunk, sent, reply):
        if call.text == "down" and call.layer == 0:
            reply[0][0, 0, 5] += reply[0].abs().max()
        return super().after(call, chunk, sent, reply)

try:
    logits(tiny, "batched", guard=Liar(tiny))
    found["lie"] = "not noticed"
except fastsplit.VerificationError as error:
    found["lie"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a copy of the tree says, to which the diffs of a plan, a family and a guard were applied."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "fastsplit", root / "fastsplit", ignore=shutil.ignore_patterns("__pycache__"))
    _apply(root, r"^fastsplit/(models|split)/|^down_guard\.py$")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert Path(found["tree"]).is_relative_to(root)
    return found


def test_a_plan_is_one_entry(recipes: dict[str, Any]) -> None:
    assert "fused-v" in recipes["plans"] and "| fused-v | 5L + 2 |" in recipes["table"]
    assert recipes["plan"] < 1e-5


def test_a_family_is_one_entry(recipes: dict[str, Any]) -> None:
    assert recipes["family"].keys() == set(recipes["plans"])
    assert max(recipes["family"].values()) < 1e-5


def test_a_guard_is_one_class(recipes: dict[str, Any]) -> None:
    assert recipes["guard"] < 1e-5
    assert recipes["lie"] == "down of layer 0 is not the product of what was sent"


# ---- tables, addresses, words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [plan_table, seen_table])
def test_generated_tables(table: Any) -> None:
    name = table.__name__
    (written,) = re.findall(rf"^<!-- {name} -->\n\n(.*?)\n\n<!-- end {name} -->$", TEXT, re.MULTILINE | re.DOTALL)
    assert written == table()


def test_the_table_of_what_is_seen_has_all_values() -> None:
    """All that steps take or give, but for what says nothing of a text: factors, and which row was selected."""
    values = {value for step in STEPS.values() for value in (*step.takes, *step.gives)}
    shown = {value for _, if_sent, if_made in SEEN for value in (*if_sent, *if_made)}
    assert values - shown == {"scale", "selected"}


def test_addresses_exist() -> None:
    rooms = "wire|tensors|schema|system|models|split|tee|executor|hf"
    paths = re.findall(rf"`((?:{rooms})/[\w/]+\.py)`", TEXT) + re.findall(r"`(tests/[\w/]+\.py)`", TEXT)
    paths += [f"fastsplit/{path}" for path in re.findall(rf"\(((?:{rooms})/[\w/]+\.py)\)", TEXT)]
    paths += re.findall(r"\]\(\.\./([\w/]+\.py)\)", TEXT)
    assert len(paths) > 60
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "fastsplit" / path).exists(), path
    named = re.findall(rf"`((?:{rooms})/[\w/]+\.py)`, (?:the table )?`(\w+)`", TEXT)
    named += [(path, name) for name, path in re.findall(rf"`(\w+)` in `((?:{rooms})/[\w/]+\.py)`", TEXT)]
    assert len(named) > 30
    for path, name in named:
        text = (ROOT / "fastsplit" / path).read_text()
        assert re.search(rf"^ *(?:class |(?:async )?def )?{name}\b", text, re.MULTILINE), (path, name)


def test_the_glossary_is_short() -> None:
    glossary = TEXT.partition("## Glossary")[2].partition("\n## ")[0]
    words = re.findall(r"^\| (\w[\w ]*) \|", glossary, re.MULTILINE)[1:]
    assert 20 <= len(words) <= 30 and words == sorted(words, key=str.lower)
