"""transformers' own `generate` on a model whose linear algebra is done by another process, and a batch without it.

Without a directory the model is random:tiny, whose tokens are numbers and no text.

    python examples/generate.py [MODEL_DIR]
"""

import subprocess
import sys
import tempfile

import torch
from transformers import AutoTokenizer

from fastsplit import SplitModelForCausalLM

PROMPTS = ["Why is the sky blue?", "What is the capital of France?"]
MODES = {"greedy": {}, "beams": {"num_beams": 4}, "sampled": {"do_sample": True, "temperature": 0.7}}


def main(model_dir: str = "random:tiny") -> None:
    if model_dir.startswith("random:"):
        tokenizer = None
        ids = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 6, 7, 8]])  # shorter prompts are padded on the left
        inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    else:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
    with tempfile.TemporaryDirectory() as directory:
        uri = f"unix://{directory}/gpu.sock"
        command = [sys.executable, "-m", "fastsplit.gpu_side", "--model", model_dir, "--listen", uri]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as gpu_side:
            try:
                if gpu_side.stdout.readline().startswith(b"READY"):
                    run(uri, model_dir, tokenizer, inputs)
            finally:
                gpu_side.terminate()


def run(uri: str, model_dir: str, tokenizer: AutoTokenizer | None, inputs: dict[str, torch.Tensor]) -> None:
    with SplitModelForCausalLM.connect(uri, model_dir) as model:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for name, options in MODES.items():
            tokens = model.generate(**inputs, max_new_tokens=16, **{"do_sample": False, **options})
            for new in tokens[:, ids.shape[1] :]:
                print(f"{name}:", tokenizer.decode(new, skip_special_tokens=True) if tokenizer else new.tolist())
        with torch.inference_mode():  # the same prompts, without transformers: each step's token of each prompt
            prompts = [row[keep.bool()] for row, keep in zip(ids, mask)]
            print("steps:", *model.runner.generate_batch(prompts, max_new_tokens=4))
        print(f"plan {model.runner.plan}, {model.channel.stats.calls} calls")


if __name__ == "__main__":
    main(*sys.argv[1:2])
