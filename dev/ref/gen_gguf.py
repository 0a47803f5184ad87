#!/usr/bin/env python3
"""Golden files of test_gguf: needs pip install gguf safetensors numpy (and torch transformers for --check).

    python dev/ref/gen_gguf.py [--check]

test/golden/gguf_blocks.safetensors   raw blocks of every type and their values by gguf.quants.dequantize
test/golden/gguf_tiny.gguf            a one-block Llama of mixed types, q and k permuted as llama.cpp's converter does
test/golden/gguf_tiny.safetensors     its weights as a Hugging Face model has them (f32)
--check loads gguf_tiny.gguf with transformers' own reader and compares.
"""
import argparse
import math
import os
import numpy as np
import gguf
from gguf import GGMLQuantizationType as T
from safetensors.numpy import save_file

GOLDEN = os.path.join(os.path.dirname(__file__), "..", "..", "test", "golden")
rng = np.random.default_rng(7)


def scales(n):
    """f16 scales: ordinary, negative, zero, the smallest subnormal, large."""
    special = np.array([0.0, -0.0117, 6e-8, 1000.0, -3.1e-5], dtype=np.float16)
    return np.concatenate([special, rng.normal(0, 0.05, max(0, n - 5)).astype(np.float16)])[:n]


# Where a block keeps its f16 scales (byte offsets).
SCALES = {T.Q8_0: [0], T.Q4_0: [0], T.Q5_0: [0], T.Q4_1: [0, 2], T.Q5_1: [0, 2], T.Q4_K: [0, 2], T.Q5_K: [0, 2],
          T.Q6_K: [208]}


def blocks():
    out = {}
    for t, where in SCALES.items():
        values, size = gguf.GGML_QUANT_SIZES[t]
        n = 3 * max(1, 256 // values)
        raw = rng.integers(0, 256, (n, size), dtype=np.uint8)
        for k, at in enumerate(where):
            raw[:, at:at + 2] = np.roll(scales(n), k).reshape(n, 1).view(np.uint8)
        raw = raw.reshape(3, -1)
        out[t.name + ".raw"] = raw
        out[t.name + ".f32"] = gguf.quants.dequantize(raw, t).astype(np.float32).reshape(3, -1)
    half = rng.normal(0, 1, (3, 40)).astype(np.float32)
    out["F16.raw"] = half.astype(np.float16).view(np.uint8)
    out["F16.f32"] = half.astype(np.float16).astype(np.float32)
    out["BF16.raw"] = gguf.quants.quantize(half, T.BF16).view(np.uint8)
    out["BF16.f32"] = gguf.quants.dequantize(out["BF16.raw"], T.BF16).reshape(3, -1)
    save_file(out, os.path.join(GOLDEN, "gguf_blocks.safetensors"))


def permute(w, heads):
    return w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def unpermute(w, heads):
    return w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def tiny():
    C, NH, NKV, HS, FF, V, theta, factor = 32, 4, 2, 8, 64, 64, 500000.0, 8.0
    path = os.path.join(GOLDEN, "gguf_tiny.gguf")
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(131072)
    w.add_embedding_length(C)
    w.add_block_count(1)
    w.add_feed_forward_length(FF)
    w.add_head_count(NH)
    w.add_head_count_kv(NKV)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(theta)
    w.add_rope_dimension_count(HS)
    w.add_vocab_size(V)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)

    # llama3 scaling as the converter writes it: f32 divisors of the frequencies.
    freqs = 1.0 / (np.float32(theta) ** (np.arange(0, HS, 2, dtype=np.float32) / np.float32(HS)))
    factors = []
    for f in freqs:
        wavelen = 2 * math.pi / f
        if wavelen < 8192 / 4:
            factors.append(1)
        elif wavelen > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelen - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    w.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))

    golden = {}

    def add(name, hf, shape, t, heads=0):
        x = rng.normal(0, 0.05, shape).astype(np.float32)
        if len(shape) == 1:
            x = 1 + x
        if heads:
            x = permute(x, heads)
        raw = gguf.quants.quantize(x, t)
        values = gguf.quants.dequantize(raw, t).reshape(shape).astype(np.float32)
        w.add_tensor(name, raw if t != T.F32 else x, raw_dtype=t)
        golden[hf] = unpermute(values, heads) if heads else values

    add("token_embd.weight", "model.embed_tokens.weight", (V, C), T.Q8_0)
    b, h = "blk.0.", "model.layers.0."
    add(b + "attn_norm.weight", h + "input_layernorm.weight", (C,), T.F32)
    add(b + "attn_q.weight", h + "self_attn.q_proj.weight", (NH * HS, C), T.Q4_0, NH)
    add(b + "attn_k.weight", h + "self_attn.k_proj.weight", (NKV * HS, C), T.F16, NKV)
    add(b + "attn_v.weight", h + "self_attn.v_proj.weight", (NKV * HS, C), T.BF16)
    add(b + "attn_output.weight", h + "self_attn.o_proj.weight", (C, NH * HS), T.Q4_1)
    add(b + "ffn_norm.weight", h + "post_attention_layernorm.weight", (C,), T.F32)
    add(b + "ffn_gate.weight", h + "mlp.gate_proj.weight", (FF, C), T.Q5_0)
    add(b + "ffn_up.weight", h + "mlp.up_proj.weight", (FF, C), T.Q5_1)
    add(b + "ffn_down.weight", h + "mlp.down_proj.weight", (C, FF), T.Q8_0)
    add("output_norm.weight", "model.norm.weight", (C,), T.F32)
    add("output.weight", "lm_head.weight", (V, C), T.F32)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    save_file({k: np.ascontiguousarray(v) for k, v in golden.items()}, os.path.join(GOLDEN, "gguf_tiny.safetensors"))
    return golden


def check(golden):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(GOLDEN, gguf_file="gguf_tiny.gguf", dtype=torch.float32)
    state = model.state_dict()
    worst = max(float(np.abs(state[k].numpy() - v).max()) for k, v in golden.items())
    print(f"transformers reads the same weights: worst difference {worst:g}")


parser = argparse.ArgumentParser()
parser.add_argument("--check", action="store_true")
args = parser.parse_args()
os.makedirs(GOLDEN, exist_ok=True)
blocks()
golden = tiny()
if args.check:
    check(golden)
