"""Make smollm2_logits.safetensors: reference logits of SmolLM2-135M-Instruct.

Hugging Face transformers loads the GGUF file, dequantizes it to float32 and runs three
prompts on the CPU with eager attention. Kept per prompt i: `tokens_i` (T,) int32,
`logits_i` (T, 64) float32 at the ids in `vocab_ids` (64,) int32, and `argmax_i` (T,) int32
over the whole vocabulary. The string metadata holds the prompts' texts (JSON), the versions
of torch and transformers, and the sha256 of the GGUF file.

Run:   python tests/golden/make_golden.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf
Needs: torch, transformers, gguf, accelerate, safetensors, numpy. Only this script needs torch
       and transformers; the tests read the committed file.
The committed file was made with torch 2.13.0 (CPU), transformers 5.23.0, gguf 0.19.0.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTION = "What is the capital of Peru?"
PLAIN = "In 1889, the café near São Paulo sold 3,250 crêpes."
LONG = """Here is a small Python function that adds up the squares of the even numbers:

def even_squares(n):
    return sum(i * i for i in range(n) if i % 2 == 0)

Calling even_squares(10) gives 120 🎉 and takes"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the golden logits of SmolLM2-135M.")
    parser.add_argument("gguf", type=Path, help="the model's GGUF file")
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / "smollm2_logits.safetensors")
    args = parser.parse_args()

    torch.set_num_threads(1)
    source = {"pretrained_model_name_or_path": args.gguf.parent, "gguf_file": args.gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    prompts = [chat, PLAIN, LONG]
    vocab_ids = np.linspace(0, model.config.vocab_size - 1, 64).astype(np.int32)
    tensors = {"vocab_ids": vocab_ids}
    for i, prompt in enumerate(prompts):
        tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.inference_mode():
            logits = model(tokens).logits[0].numpy()
            reply = model.generate(tokens, max_new_tokens=12, do_sample=False)
        tensors[f"tokens_{i}"] = tokens[0].numpy().astype(np.int32)
        tensors[f"logits_{i}"] = np.ascontiguousarray(logits[:, vocab_ids])
        tensors[f"argmax_{i}"] = logits.argmax(axis=-1).astype(np.int32)
        continuation = tokenizer.decode(reply[0, tokens.shape[1] :])
        print(f"prompt {i}: {tokens.shape[1]} tokens, goes on: {continuation!r}")

    metadata = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompts": json.dumps(prompts),
        "gguf_sha256": hashlib.sha256(args.gguf.read_bytes()).hexdigest(),
    }
    save_file(tensors, args.out, metadata=metadata)
    print(f"{args.out.name}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
