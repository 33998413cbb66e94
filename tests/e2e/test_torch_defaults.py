"""torch's defaults are the program's own affair: whatever device, dtype, autocast or mode it has set, on either side,
the split computes what transformers does under plain ones, and draws no number from torch's generator."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsplit
from fastsplit.executor.service import Executor
from fastsplit.models import Rope, open_model
from fastsplit.split.rope import inverse_frequencies
from fastsplit.tee.sampling import Sampling

pytest.importorskip("transformers")
from split import CONFIGS, load_hf, make_model, relative_error

from fastsplit import SplitModelForCausalLM


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# "meta" stands for "cuda": any device that is not the CPU, on a machine without one
DEFAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "device context": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "deterministic": deterministic,
}

MODELS = ("dynamic rope", "gemma3", "granite")
IDS = torch.tensor([[0, 17, 3, 88, 41, 9, 60, 22], [7, 8, 9, 10, 11, 12, 13, 14]])
MASK = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1] * 8])
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95},
}


def generated(model: Any, way: str) -> torch.Tensor:
    torch.manual_seed(5)
    ids: torch.Tensor = model.generate(
        IDS, attention_mask=MASK, max_new_tokens=8, pad_token_id=0, eos_token_id=96, **WAYS[way]
    )
    return ids


def step_logits(model: Any) -> torch.Tensor:
    """Of one row behind others: what a single row's products are made of is another way than many rows'."""
    past = model(IDS[1:], use_cache=True).past_key_values
    logits: torch.Tensor = model(torch.tensor([[5]], device="cpu"), past_key_values=past).logits
    return logits


class Reference:
    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        make_model(directory, CONFIGS[name])
        model = load_hf(directory)
        self.tokens = {way: generated(model, way) for way in WAYS}
        with torch.no_grad():
            self.logits, self.step = model(IDS[1:]).logits, step_logits(model)
        self.drawn = self.run(contextlib.nullcontext, directory / "plain.sock")[0]

    def run(self, defaults: Callable[[], contextlib.AbstractContextManager[Any]], socket: Path) -> tuple[Any, ...]:
        """What `Runner.generate_batch` draws, logits, a step's logits, tokens; both sides made and used under the
        defaults."""
        state = torch.get_rng_state()
        with defaults():
            executor = Executor(open_model(str(self.directory)))
            with (
                fastsplit.Server(f"unix://{socket}", executor.handlers, arrays="torch") as server,
                SplitModelForCausalLM.connect(server.uri, self.directory) as model,
            ):
                steps = model.runner.generate_batch([IDS[0, 1:], IDS[1]], 6, sampling=Sampling(0.9, 30, 0.95, 11))
                drawn = list(steps)
                logits, step = model(IDS[1:]).logits, step_logits(model)
                assert torch.equal(torch.get_rng_state(), state), "torch's generator is the program's own"
                return drawn, logits, step, {way: generated(model, way) for way in WAYS}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    def make(name: str) -> Reference:
        if name not in made:
            made[name] = Reference(tmp_path_factory.mktemp("model"), name)
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("defaults", DEFAULTS)
@pytest.mark.matrix(one_in=4)
def test_defaults_change_nothing(
    reference: Callable[[str], Reference], socket_dir: Path, name: str, defaults: str
) -> None:
    expected = reference(name)
    drawn, logits, step, tokens = expected.run(DEFAULTS[defaults], socket_dir / "s")
    assert drawn == expected.drawn
    with torch.no_grad():
        for found, wanted in ((logits, expected.logits), (step, expected.step)):
            assert (found.dtype, found.device.type) == (torch.float32, "cpu")
            assert relative_error(found, wanted) < 1e-5
    for way, ids in tokens.items():
        assert torch.equal(ids, expected.tokens[way]), way


@pytest.mark.parametrize("defaults", DEFAULTS)
def test_random_weights_do_not_depend_on_defaults(defaults: str) -> None:
    model = open_model("random:tiny-gemma3")
    expected = dict(model.items())
    state = torch.get_rng_state()
    with DEFAULTS[defaults]():
        found = dict(open_model("random:tiny-gemma3").items())
    for name, weight in expected.items():
        assert (found[name].dtype, found[name].device.type) == (torch.float32, "cpu")
        assert torch.equal(found[name], weight)
    assert torch.equal(torch.get_rng_state(), state)


ROPES = (
    Rope(),
    Rope("linear", factor=4.0),
    Rope("dynamic", factor=2.0, max_position_embeddings=8),
    Rope("yarn", factor=4.0, original_max_position_embeddings=64),
    Rope("llama3", factor=8.0, original_max_position_embeddings=64),
    Rope("longrope", short_factor=(1.0,) * 8, long_factor=(2.0,) * 8, original_max_position_embeddings=8),
    Rope("proportional", partial=0.5),
)


@pytest.mark.parametrize("defaults", DEFAULTS)
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
def test_frequencies_do_not_depend_on_defaults(rope: Rope, defaults: str) -> None:
    """tests/unit/test_rope.py compares them with transformers'."""
    expected, _ = inverse_frequencies(rope, 16, 20)
    with DEFAULTS[defaults]():
        found, _ = inverse_frequencies(rope, 16, 20)
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("defaults", DEFAULTS)
def test_calls_under_any_defaults(socket_uri: str, defaults: str) -> None:
    """Tensors come as they were sent, and `empty` gives memory of the CPU."""
    sent = torch.arange(3000, dtype=torch.float32).view(30, 100)

    def double(call: fastsplit.Call) -> torch.Tensor:
        (x,) = call.tensors
        reply: torch.Tensor = call.empty(x.shape, "float32")
        return torch.mul(x, 2, out=reply)

    with (
        DEFAULTS[defaults](),
        fastsplit.Server(socket_uri, {"double": double}, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
    ):
        memory = channel.empty(sent.shape, "float32")
        assert (memory.dtype, memory.device.type) == (torch.float32, "cpu")
        for attrs in ({}, {"wire_dtype": "bfloat16"}):
            (reply,) = channel.call("double", memory.copy_(sent), **attrs)
            assert (reply.dtype, reply.device.type) == (torch.float32, "cpu")
            assert relative_error(reply, 2 * sent) < (1e-2 if attrs else 1e-9)


FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
} | {
    "randperm",
    "scalar_tensor",
    "tensor",
    "zeros",
}


@pytest.mark.parametrize("path", sorted(Path(fastsplit.__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_every_tensor_is_made_with_device_and_dtype(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        if not isinstance(owner, ast.Name) or owner.id != "torch":
            continue
        said = {keyword.arg for keyword in node.keywords}
        if name in FACTORIES:
            assert {"device", "dtype"} <= said, f"{path.name}:{node.lineno}: torch.{name} by torch's defaults"
        if name == "Generator":
            assert node.args, f"{path.name}:{node.lineno}: torch.Generator on torch's default device"
