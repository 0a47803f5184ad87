#!/usr/bin/env python3
"""Does transformers load what we export, and compute the same logits? Needs pip install torch transformers safetensors numpy.

    make PRECISION=fp32 && python dev/ref/check_hf_export.py MODEL FOLDER [--eval ./eval] [--tokens N] [--bound B]

FOLDER is the Hugging Face folder exported from MODEL (train_llama_qat --hf, quantize --hf-out). Our logits come from
`eval MODEL --tokens ... --logits-out` (default model: FOLDER itself, if MODEL is "-"), theirs from LlamaForCausalLM in f32.

Bound on the largest difference, relative to the largest logit. Both sides sum in f32, u = 2^-24: an inner product of length K
is off by at most K u of the sum of magnitudes and, with roundings that do not conspire, by about sqrt(K) u; some seven such
sums stand in a row in each of L blocks and their errors add along the residual stream, again as a root: sqrt(7 L K) u. For 30
blocks of 1,536 that is 3.4e-5; the default of 1e-4 leaves a factor of three for sums larger than their result. A wrong rope, norm
or head is off by 1e-2 and more. For the bf16 build give --bound 0.05 (sqrt(7 L) 2^-9 = 2.8e-2, its activations being rounded).
"""
import argparse
import subprocess
import sys
import tempfile
import os
import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("folder")
parser.add_argument("--eval", default="./eval")
parser.add_argument("--eval-args", default="", help="more options for eval, as in --float")
parser.add_argument("--tokens", type=int, default=48)
parser.add_argument("--bound", type=float, default=1e-4)
args = parser.parse_args()

model, info = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, output_loading_info=True)
for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    if info.get(key):
        sys.exit(f"transformers: {key}: {info[key]}")
model.eval()
config = model.config
print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, "
      f"tied {config.tie_word_embeddings}, eos {GenerationConfig.from_pretrained(args.folder).eos_token_id}")
if os.path.exists(os.path.join(args.folder, "tokenizer.json")):
    tok = AutoTokenizer.from_pretrained(args.folder)
    text = "Hello, world! 12345 naïve façade — 東京 😀\n\n  def f(x): return x\n"
    ids = tok(text, add_special_tokens=False).input_ids
    back = tok.decode(ids)
    print(f"{type(tok).__name__}: {len(ids)} tokens, text survives: {back == text}")

rng = np.random.default_rng(3)
tokens = rng.integers(0, config.vocab_size, args.tokens).tolist()
with torch.no_grad():
    theirs = model(torch.tensor([tokens])).logits[0].numpy()
with tempfile.TemporaryDirectory() as tmp:
    out = os.path.join(tmp, "logits.safetensors")
    source = args.folder if args.model == "-" else args.model
    subprocess.run([args.eval, source, "--tokens", ",".join(map(str, tokens)), "--logits-out", out] + args.eval_args.split(),
                   check=True)
    ours = load_file(out)["logits"]
diff = np.abs(ours - theirs).max()
scale = np.abs(theirs).max()
same = (ours.argmax(1) == theirs.argmax(1)).mean()
print(f"logits {ours.shape}: largest difference {diff:.3g} of {scale:.3g} = {diff / scale:.3g} (bound {args.bound:g}), "
      f"likeliest token the same at {100 * same:.1f}% of positions")
sys.exit(not diff / scale <= args.bound)
