"""kvpress's answers to the prompts that items.py exported, at equal stored KV. Run in kvpress's own environment.

A density counts as for a plan: keys that are stored while the last token is decoded, over N. kvpress compresses what it
is given once, after reading it in full; the question and the answer come on top and are stored whole. It is run in both
ways people use it: ``blind`` compresses the text before the question is known, as MoA's plan does, and ``aware``
compresses the whole prompt, question included. Answers are kept in OUTPUT.partial as they come; the same call goes on
from there.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import kvpress
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PRESSES = {
    "SnapKV": lambda ratio: kvpress.SnapKVPress(compression_ratio=ratio),
    "AdaKV(SnapKV)": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=ratio)),
    "ObservedAttention": lambda ratio: kvpress.ObservedAttentionPress(compression_ratio=ratio),
    "StreamingLLM": lambda ratio: kvpress.StreamingLLMPress(compression_ratio=ratio, n_sink=64),
}


@torch.no_grad()
def answer(model, tokenizer, item, press, compressed):
    """Greedy answer after ``compressed`` tokens of the prompt went through the press."""
    ids = torch.tensor([item["prompt_ids"]], device=model.device)
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=ids[:, :compressed], past_key_values=cache)
    positions = torch.arange(compressed, ids.shape[1], device=model.device)[None]
    tokens, given, said = item["new_tokens"], ids[:, compressed:], []
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    for _ in range(tokens):
        logits = model(input_ids=given, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits
        given = logits[:, -1:].argmax(-1)
        positions = positions[:, -1:] + 1
        said.append(given.item())
        if said[-1] in ends:
            break
    return tokenizer.decode(said, skip_special_tokens=True)


def answers_so_far(partial, header):
    """The lines of an interrupted call, its header first; a line that was cut off is dropped."""
    lines = partial.read_text(encoding="utf-8").splitlines(keepends=True) if partial.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    if whole and whole[0] != header:
        sys.exit(
            f"{partial} was begun by another call, or with other prompts or versions ({whole[0]['command']}); "
            "remove it or give another --output"
        )
    return whole or [header]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model folder")
    parser.add_argument("items")
    parser.add_argument("--densities", default="0.5,0.25")
    parser.add_argument("--presses", default=",".join(PRESSES))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers.utils.logging.disable_progress_bar()
    given = Path(arguments.items).read_bytes()
    items = list(map(json.loads, given.splitlines()))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    machine = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvpress": version("kvpress"),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
    }
    header = {
        "command": "run.py " + " ".join(sys.argv[1:]),
        "items_sha256": hashlib.sha256(given).hexdigest(),
        "model": arguments.model,
        "device": machine,
    }
    partial = Path(arguments.output + ".partial")
    lines = answers_so_far(partial, header)
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    done = {(line["method"], line["density"], line["item"]) for line in lines[1:]}
    with partial.open("a", encoding="utf-8") as file:
        for name in arguments.presses.split(","):
            # one needs the attention weights, the others' head-wise masks need attention without them
            attention = "eager" if name == "ObservedAttention" else "sdpa"
            model = AutoModelForCausalLM.from_pretrained(
                arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation=attention
            )
            model = model.to(device).eval()
            for density in map(float, arguments.densities.split(",")):
                for way in ("blind", "aware"):
                    for number, item in enumerate(tqdm(items, f"{name} {density} {way}", mininterval=5)):
                        if (f"{name}, {way}", density, number) in done:
                            continue
                        prompt = len(item["prompt_ids"])
                        compressed = item["question_start"] if way == "blind" else prompt - 1
                        whole = item["length"] - compressed  # question and answer
                        kept = max(0.0, density * item["length"] - whole) / compressed
                        press = PRESSES[name](1 - kept)
                        text = answer(model, tokenizer, item, press, compressed)
                        row = {"method": f"{name}, {way}", "density": density, "item": number, "text": text}
                        row |= {key: item[key] for key in ("task", "length", "answers", "depth")}
                        file.write(json.dumps(row) + "\n")
                        file.flush()
    os.replace(partial, arguments.output)


if __name__ == "__main__":
    main()
