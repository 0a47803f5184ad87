#!/usr/bin/env python3
"""Do transformers and compressed-tensors load what `quantize --to hf` writes, and compute what we compute?

    pip install torch transformers safetensors numpy compressed-tensors
    make PRECISION=fp32 && python dev/ref/check_exports.py PACKED.bin FOLDER [--eval ./eval] [--tokens N]

FOLDER is the export of PACKED.bin. Two things are compared:

Weights, equal: what compressed-tensors decompresses is (code - zero) * scale; ours is that (int8 by channel, whose scale
works on sums) or that rounded to bf16. Ours come from a dequantized folder of the same file (`quantize PACKED.bin --to
dequantized --dtype f32`).

Logits, relative to the largest one, both in f32. Weight-only: weights that differ by the rounding to bf16, 2^-9 relative at
most and uniformly spread, turn an inner product by 2^-9 / sqrt(3) of the root of its sum of squares, and seven of those in each
of L blocks stand in a row: sqrt(7 L) 2^-9 / sqrt(3), 1.6e-2 for L = 30. The bound is 5e-2. Where inputs are quantized, a code
flips wherever the two disagree by a hair (and all may, where the scales are amax / 127.5 and amax / 127), so that the two
have rounding noise of equal size that is hardly the same: their difference is at most about sqrt(2) times what quantizing
the inputs changes at all, which is measured on their side alone (with it against without it); the bound is 2 of that. How
far one linear is from the formula of compressed-tensors' documentation is printed, too.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

parser = argparse.ArgumentParser()
parser.add_argument("packed")
parser.add_argument("folder")
parser.add_argument("--eval", default="./eval")
parser.add_argument("--quantize", default="./quantize")
parser.add_argument("--tokens", type=int, default=48)
parser.add_argument("--bound", type=float, default=5e-2)
args = parser.parse_args()


def run(*command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


plain = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32,
                                             quantization_config=CompressedTensorsConfig(dequantize=True))
with tempfile.TemporaryDirectory() as tmp:
    deq = os.path.join(tmp, "dequantized")
    run(args.quantize, args.packed, "--to", "dequantized", "--dtype", "f32", "--out", deq)
    ours = load_file(os.path.join(deq, "model.safetensors"))
theirs = plain.state_dict()
unequal, rounded, exact = [], 0, 0
for name, w in ours.items():
    t = theirs[name].to(torch.float32)
    if torch.equal(t, w):
        exact += 1
    elif torch.equal(t.bfloat16(), w.bfloat16()):
        rounded += 1
    else:
        unequal.append((name, (t - w).abs().max().item(), w.abs().max().item()))
print(f"weights: {exact} equal, {rounded} equal once rounded to bf16, {len(unequal)} not: {unequal[:3]}")

def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def fake_quantized(x, symmetric):
    low, high = x.amin(1, True).clamp(max=0), x.amax(1, True).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / 127.5
        return torch.clamp(torch.round(x / scale), -128, 127) * scale
    scale = (high - low) / 255
    zero = torch.clamp(-128 - torch.round(low / scale), -128, 127)
    return (torch.clamp(torch.round(x / scale) + zero, -128, 127) - zero) * scale


model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
model.eval()
group = next(iter(model.config.to_dict()["quantization_config"]["config_groups"].values()))
rng = np.random.default_rng(3)
tokens = rng.integers(0, model.config.vocab_size, args.tokens).tolist()
logits, floating = logits_of(model), logits_of(plain)
with tempfile.TemporaryDirectory() as tmp:
    out = os.path.join(tmp, "logits.safetensors")
    run(args.eval, args.packed, "--tokens", ",".join(map(str, tokens)), "--logits-out", out)
    want = load_file(out)["logits"].numpy()
scale, bound = np.abs(want).max(), args.bound
inputs = group["input_activations"]
if inputs:
    noise = np.abs(logits - floating).max() / np.abs(floating).max()
    bound = 2 * noise
    x = torch.randn(16, model.config.hidden_size, generator=torch.Generator().manual_seed(1)) + 0.3
    weight = plain.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        y = model.model.layers[0].self_attn.q_proj(x[None])[0]   # rows count as tokens in (1, tokens, width) only
        z = fake_quantized(x, inputs["symmetric"]) @ weight.T
    off = ((y - z).abs().max() / z.abs().max()).item()
    print(f"inputs: quantizing them changes logits by {noise:.3g}; one linear is off by {off:.3g} from the formula in f32")
diff = np.abs(want - logits).max()
same = (want.argmax(1) == logits.argmax(1)).mean()
print(f"logits: largest difference {diff:.3g} of {scale:.3g} = {diff / scale:.3g} (bound {bound:.3g}), likeliest token the same "
      f"at {100 * same:.1f}% of positions")
sys.exit(bool(unequal) or not diff / scale <= bound)
