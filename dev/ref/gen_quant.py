"""Golden vectors of every quantization scheme: codes, scales, zero points, dequantized values of torchao's primitives.

    pip install torch torchao safetensors        (made with torch 2.15, torchao 0.18)
    python dev/ref/gen_quant.py                  writes test/golden/quant.safetensors

Tensors are named INPUT (the data, bf16 or f32) and SPEC|INPUT|codes, |scale, |zero, |dq, |mask, with SPEC in the text
that quant_spec_parse reads. Scales and zero points are f32, row-major over blocks. Taken from torchao as it is:
- choose_qparams_affine in the data's dtype, its result widened to f32; quantize_affine with the f32 scale;
  dequantize_affine into the data's dtype. The clip mask is [qmin <= q <= qmax] of the same function's codes with the
  clamp moved out of reach; autograd is no oracle for it, since the gradient of torch.clamp at its very bounds is 1 in
  most versions of PyTorch and 0 in some (2.15).
- for the float zero point _choose_qparams_affine_tinygemm and _quantize_affine_tinygemm with bf16 qparams. Its eager
  dequantization rounds the product and the sum; the serving kernels and we do one fused multiply-add. So dq is made
  here from exact rational arithmetic, rounded to f32 and then to bf16, and the script prints how many values differ.
"""
import os
import warnings
from fractions import Fraction

warnings.filterwarnings("ignore")
import torch
from safetensors.torch import save_file
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_affine_tinygemm,
    _dequantize_affine_tinygemm,
    _quantize_affine_no_dtype_cast,
    _quantize_affine_tinygemm,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

EPS_WEIGHT, EPS_ACT, EPS_FLOAT = 2.0**-126, 2.0**-23, 1e-6
MAPPING = {
    "symmetric": MappingType.SYMMETRIC,
    "symmetric-no-clip": MappingType.SYMMETRIC_NO_CLIPPING_ERR,
    "asymmetric": MappingType.ASYMMETRIC,
}


def nasty(rows, cols, dtype, generator):
    """Random rows of several magnitudes with the cases that hurt planted in some stretches of 16 values."""
    x = torch.randn(rows, cols, generator=generator)
    x *= 10.0 ** torch.linspace(-3, 2, rows)[:, None] if rows > 1 else 0.05
    spots = x.view(-1, 16)
    plants = [
        torch.zeros(16),
        torch.full((16,), 0.30078125),                      # constant
        torch.full((16,), -2.5),
        torch.linspace(1e-9, 4e-9, 16),                     # far below the activations' eps
        torch.linspace(-3e-38, 2e-38, 16),                  # subnormal scales
        torch.linspace(-1e37, 9e37, 16),                    # large, ranges still finite
        torch.cat([torch.full((15,), 1e-3), torch.tensor([50.0])]),   # one outlier
        torch.arange(16) * 0.5 - 4.25,                      # ties
        torch.cat([torch.zeros(8), -torch.zeros(8)]),
        torch.arange(16) + 100.0,                           # far from zero
    ]
    for i, plant in enumerate(plants):
        at = 3 * i + 1
        if at < spots.shape[0] and rows > 1:
            spots[at] = plant
    return x.to(dtype)


def block_of(granularity, shape):
    if granularity == "tensor":
        return list(shape)
    if granularity in ("channel", "token"):
        return [1, shape[1]]
    key, value = granularity.split("=")
    return [1, int(value)] if key == "group" else [int(v) for v in value.split("x")]


def fma_dequant(codes, block, scale, zero, mid, dtype):
    """bf16(f32(exact)): what one fused multiply-add in f32 and one rounding to the data's dtype give."""
    spread = lambda q: q.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1).double()
    s, z = spread(scale), spread(zero)
    exact = (codes.double() - mid) * s + z
    flat = [t.flatten().tolist() for t in (codes, s, z, exact, exact.view(torch.int64) & 0x1FFFFFFF)]
    for c, a, b, e, below_f32 in zip(*flat):
        full = Fraction(c - mid) * Fraction(a) + Fraction(b)
        # Where f64 is not exact already it must at least not sit on an f32 tie that the exact value does not.
        assert full == Fraction(e) or below_f32 != 0x10000000
    return exact.float().to(dtype)


def main():
    g = torch.Generator().manual_seed(20)
    out, inputs = {}, {}
    for rows, cols in [(1, 32), (3, 64), (17, 96), (5, 128)]:
        for dtype, name in [(torch.bfloat16, "bf16"), (torch.float32, "f32")]:
            if dtype == torch.float32 and rows == 17:
                continue                                     # size
            inputs[f"{name}_{rows}x{cols}"] = nasty(rows, cols, dtype, g)
    out.update(inputs)

    weights = [f"int{b},group=32,symmetric" for b in range(2, 9)]
    weights += ["int4,group=16,symmetric-no-clip", "int8,channel,symmetric", "int4,tensor,symmetric",
                "int5,block=1x16,symmetric", "int4,group=32,asymmetric",
                "uint4,group=32,asymmetric", "uint4,group=32,float", "uint3,group=16,float"]
    acts = ["int8,token,symmetric", "int8,token,asymmetric"]
    differing = total = 0
    for spec in weights + acts:
        kind, granularity, mapping = spec.split(",")
        unsigned, bits = kind[0] == "u", int(kind[-1])
        act = granularity == "token"
        qmin, qmax = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if spec == "int8,token,symmetric":
            qmin = -127
        for name, x in inputs.items():
            if not act and x.dtype != torch.bfloat16:
                continue                                     # weights are always quantized from bf16
            if spec.startswith(("int5,group", "int6", "int7")) and x.shape[0] == 17:
                continue                                     # size
            block = block_of(granularity, x.shape)
            key = f"{spec}|{name}|"
            target = torch.uint8 if unsigned else torch.int8
            if mapping == "float":
                scale, zero = _choose_qparams_affine_tinygemm(
                    x, MappingType.ASYMMETRIC, block, torch.int32, qmin, qmax, EPS_FLOAT, x.dtype, x.dtype)
                codes = _quantize_affine_tinygemm(x, block, scale, zero, torch.int32, qmin, qmax)
                eager = _dequantize_affine_tinygemm(
                    codes, block, scale, zero, torch.int32, qmin, qmax, output_dtype=x.dtype)
                blocks = [x.shape[0] // block[0], x.shape[1] // block[1]]
                dq = fma_dequant(
                    codes, block, scale.float().view(blocks), zero.float().view(blocks), 2 ** (bits - 1), x.dtype)
                differing += (dq != eager).sum().item()
                total += dq.numel()
                out[key + "zero"] = zero.float().reshape(-1)
            else:
                scale, zero = choose_qparams_affine(
                    x, MAPPING[mapping], block, torch.int8 if not unsigned else torch.uint8, qmin, qmax,
                    EPS_ACT if act else EPS_WEIGHT, torch.float32, torch.int32)
                codes = quantize_affine(x, block, scale, zero, torch.int32, qmin, qmax)
                dq = dequantize_affine(codes, block, scale, zero, torch.int32, qmin, qmax, output_dtype=x.dtype)
                if mapping == "asymmetric":
                    out[key + "zero"] = zero.float().reshape(-1)
                if spec in ("int4,group=32,symmetric", "int8,token,asymmetric"):
                    free = _quantize_affine_no_dtype_cast(x, block, scale, zero, -1e9, 1e9)
                    out[key + "mask"] = ((free >= qmin) & (free <= qmax)).to(torch.uint8)
            assert torch.isfinite(dq).all(), key
            out[key + "codes"] = codes.to(target).contiguous()
            out[key + "scale"] = scale.float().reshape(-1)
            out[key + "dq"] = dq.contiguous()
    path = os.path.join(os.path.dirname(__file__), "..", "..", "test", "golden", "quant.safetensors")
    save_file(out, path)
    print(f"{len(out)} tensors, {os.path.getsize(path)} bytes")
    print(f"float zero point: fused and eager dequantization differ in {differing} of {total} values")
    for name in ("int4,group=32,symmetric|bf16_17x96|mask", "int8,token,asymmetric|f32_5x128|mask"):
        print(name, "clipped:", (out[name] == 0).sum().item())


main()
