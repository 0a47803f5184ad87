"""Golden vectors of tiny Llamas: logits, loss and the gradient of every parameter, from transformers in f32.

Needs: pip install torch transformers safetensors.   Run from the repository root: python dev/ref/gen_llama.py
Writes test/golden/llama_NAME.safetensors, one file a variant:

  gqa      4 query heads on 2, untied head
  tied     one table for embedding and head, 4 heads on 4
  llama3   rope_scaling llama3; the original context of 64 puts the 4 frequencies into all three of its zones;
           configuration as transformers 5 writes it (rope_parameters)
  linear   rope_scaling linear, factor 4; 3 of the targets are -100 (not counted)
  headdim  head_dim 16 where hidden_size / heads is 8, 4 heads on 1, tied

Metadata key `config`: the text of config.json. Tensors:

  HF_NAME         bf16      weights. Their f32 values are representable in bf16, so both builds start from the same
                            numbers. A tied model has model.embed_tokens.weight and no lm_head.weight
  grad.HF_NAME    f32       d loss / d weight; of a tied table the sum of both uses
  tokens          (B,T) i32
  targets         (B,T) i32 -100: does not count
  logits          (B,T,V) f32
  loss            (1) f32   mean of the cross entropy over the targets that count
  inv_freq        (HS/2) f32  rotary frequencies, scaling applied

Everything is computed on the CPU in f32 with attention spelled out ("eager"), one thread, fixed seeds. Weights are
drawn larger than a fresh model's, so that softmax, SwiGLU and the norms work far from their linear range: loss differs
from log V, and a wrong mask, head order or rotation moves every figure.
"""

import json

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

B, T = 2, 24
BASE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=61, max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=10000.0)
VARIANTS = {
    "gqa": dict(tie_word_embeddings=False),
    "tied": dict(tie_word_embeddings=True, num_key_value_heads=4),
    "llama3": dict(tie_word_embeddings=False, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64)),
    "linear": dict(tie_word_embeddings=False, rope_scaling=dict(rope_type="linear", factor=4.0)),
    "headdim": dict(tie_word_embeddings=True, num_key_value_heads=1, head_dim=16),
}


def config_text(fields, config, name):
    """config.json: in the old form, with rope_theta and rope_scaling apart, except for llama3."""
    if name == "llama3":
        return config.to_json_string(use_diff=False)
    c = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", attention_bias=False,
             mlp_bias=False, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16", **fields)
    return json.dumps(c)


def build(name, seed):
    fields = {**BASE, **VARIANTS[name]}
    rope = dict(fields.get("rope_scaling") or {"rope_type": "default"})
    rope["rope_theta"] = fields["rope_theta"]
    arguments = {k: v for k, v in fields.items() if k not in ("rope_scaling", "rope_theta")}
    config = LlamaConfig(**arguments, rope_parameters=rope, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
                         architectures=["LlamaForCausalLM"])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for key, p in model.named_parameters():
            value = 1 + 0.25 * torch.randn_like(p) if "norm" in key else 0.2 * torch.randn_like(p)
            p.copy_(value.bfloat16().float())
    return fields, config, model


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for index, name in enumerate(VARIANTS):
        fields, config, model = build(name, 100 + index)
        generator = torch.Generator().manual_seed(200 + index)
        text = torch.randint(0, fields["vocab_size"], (B, T + 1), generator=generator)
        text[0, 3:6] = text[0, 10:13]                      # repeated tokens add up in the embedding's gradient
        tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        if name == "linear":
            targets[0, 0] = targets[0, 7] = targets[1, -1] = -100
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
        loss.backward()
        out = {"tokens": tokens.int(), "targets": targets.int(), "logits": logits.detach(),
               "loss": loss.detach().reshape(1),
               "inv_freq": model.model.rotary_emb.inv_freq.float().clone()}
        for key, p in model.named_parameters():            # a tied table appears once
            assert torch.equal(p, p.bfloat16().float())
            out[key] = p.detach().bfloat16()
            out["grad." + key] = p.grad
        path = f"test/golden/llama_{name}.safetensors"
        save_file({k: v.contiguous() for k, v in out.items()}, path,
                  metadata={"config": config_text(fields, config, name)})
        print(path, "loss %.6f" % loss.item(), "inv_freq", out["inv_freq"].tolist())


if __name__ == "__main__":
    main()
