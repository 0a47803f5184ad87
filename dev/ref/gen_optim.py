"""Golden vectors of INT8 training and low-bit optimizers, made by torchao (prototype.quantized_training, optim).

    pip install torch torchao safetensors        (made with torch 2.15, torchao 0.18)
    python dev/ref/gen_optim.py                  writes test/golden/optim.safetensors

rows|x, |u         INT8 rows: values, and the random numbers of stochastic rounding; |scale, |nearest, |stochastic
sr|x, |r, |y       bf16 stochastic rounding: values, random 16 bits, results
map|s8 ...         the maps of states
state|m, |v        moments; state|FORMAT|m.codes, .scale, .dq: the same as states
step|p, |g1, |g2   AdamW on f32 parameters, two steps; step|FORMAT|p, |m, |v (f32) or |m.codes, .scale ...: after them,
                   f32 tensors as far as half of the rows

The steps are torchao's single_param_adam run eagerly, with two of PyTorch's CPU kernels replaced, whose last bits are
their library's own: lerp may or may not fuse its multiplication with its addition, here lerp(a, b, w) is
a + w * (b - a), each operation rounded; sqrt is correctly rounded here, which the vectorized one is not. So it is what
numerics.md says. The script prints how far PyTorch's own results are from that.
"""
import os
import warnings
from unittest import mock

warnings.filterwarnings("ignore")
import torch
from safetensors.torch import save_file
from torchao import optim
from torchao.optim import adam, quant_utils, subclass_4bit, subclass_8bit
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8
from torchao.prototype.quantized_training import int8
from torch.utils._python_dispatch import TorchDispatchMode

g = torch.Generator().manual_seed(25)


def randn(*shape):
    return torch.randn(*shape, generator=g)


def rows():
    x = randn(9, 80) * 10.0 ** torch.linspace(-4, 3, 9)[:, None]
    x[1] = 0
    x[2] = 0.30078125
    x[3, :5] = torch.tensor([0.5, -1.27, 0.013, 1.0, -0.004])
    x[3, 5:] = 0
    x[4] = torch.arange(80) * 0.5 - 20.25
    x[5] = torch.linspace(-3e-38, 2e-38, 80)
    x[6] *= 1e-12
    u = torch.rand(9, 80, generator=g)
    u[7] = 1 - 2.0**-24
    u[8] = 0
    nearest, scale = int8.quantize_int8_rowwise(x)
    with mock.patch.object(torch, "rand_like", lambda t: u):
        stochastic, same = int8.quantize_int8_rowwise(x, stochastic_rounding=True)
    assert torch.equal(scale, same)
    return {"rows|x": x, "rows|u": u, "rows|scale": scale, "rows|nearest": nearest, "rows|stochastic": stochastic}


def bf16_sr():
    x = randn(512) * 10.0 ** torch.linspace(-38, 37, 512)
    x[:6] = torch.tensor([-0.3001, 3.14159265, 0.0, -0.0, 1e-40, 1.0])
    r = torch.randint(0, 1 << 16, (512,), generator=g, dtype=torch.int32)
    r[6:12], r[12:18] = 0, 65535
    with mock.patch.object(torch, "randint", lambda *a, **k: r):
        y = quant_utils._fp32_to_bf16_sr(x)
    return {"sr|x": x, "sr|r": r, "sr|y": y}


FORMATS = {
    "int8": lambda n, signed: OptimState8bit.zeros((n,), signed),
    "int4": lambda n, signed: OptimState4bit.zeros((n,), signed),
    "fp8": lambda n, signed: OptimStateFp8.zeros((n,)),
}


def parts(name, state, out):
    out[name + ".codes"] = state.codes.view(torch.uint8).reshape(-1).clone()
    out[name + ".scale"] = state.scale.clone()


def states():
    n = 1536
    m = randn(n) * 10.0 ** (-7 * torch.rand(n, generator=g))
    m[256:512] = 0
    m[512:768] = -0.125
    m[768:1024] = torch.linspace(-1, 1, 256)
    m[1024:1280] *= 1e-13
    v = m * m * 10.0 ** (-2 * torch.rand(n, generator=g))
    v[768:1024] = torch.linspace(0, 1, 256)
    out = {"state|m": m, "state|v": v}
    for name, zeros in FORMATS.items():
        for key, x, signed in (("m", m, True), ("v", v, False)):
            s = zeros(n, signed)
            s.copy_(x)
            parts(f"state|{name}|{key}", s, out)
            out[f"state|{name}|{key}.dq"] = s.dequantize()
    return out


class Exact(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.lerp.Scalar:
            a, b, w = args
            if hasattr(a, "dequantize") and type(a) is not torch.Tensor:
                a = a.dequantize()
            return a + w * (b - a)
        if func is torch.ops.aten.sqrt.default:
            return args[0].double().sqrt().float()
        return func(*args, **(kwargs or {}))


def step(optimizer, p, grads, mode):
    """Two steps by single_param_adam; optimizer gives the states and the defaults."""
    p = torch.nn.Parameter(p.clone())
    o = optimizer([p])
    d = o.defaults
    m, v = o._new_buffer(p, True), o._new_buffer(p, False)
    lr = o.param_groups[0]["lr"]
    with torch.no_grad():
        for t, grad in enumerate(grads):
            args = (p.detach(), grad, torch.tensor(float(t + 1)), m, v, None, lr, *d["betas"], d["weight_decay"],
                    d["eps"], True, False)
            if mode is None:
                adam.single_param_adam(*args)
            else:
                with mode:
                    adam.single_param_adam(*args)
    return p.detach(), m, v


def steps():
    p = (randn(16, 256) * 0.05).bfloat16()
    grads = [(randn(16, 256) * 10.0 ** (-3 * torch.rand(16, 256, generator=g))).bfloat16() for _ in range(2)]
    grads[0][3] = 0
    out = {"step|p": p, "step|g1": grads[0], "step|g2": grads[1]}
    f32 = [t.float() for t in grads]
    for name, optimizer in (("f32", optim._AdamW), ("int8", optim.AdamW8bit), ("int4", optim.AdamW4bit),
                            ("fp8", optim.AdamWFp8)):
        q, m, v = step(optimizer, p.float(), f32, Exact())
        own = step(optimizer, p.float(), f32, None)
        print(f"{name}: with PyTorch's kernels {(own[0] != q).sum().item()} of {q.numel()} parameters differ, "
              f"by {((own[0] - q).abs() / q.abs()).max().item():.1e} at most")
        out[f"step|{name}|p"] = q[:8].clone()
        if name == "f32":
            out["step|f32|m"], out["step|f32|v"] = m[:8].clone(), v[:8].clone()
        else:
            parts(f"step|{name}|m", m, out)
            parts(f"step|{name}|v", v, out)
    return out


def main():
    out = {
        "map|s8": torch.tensor(subclass_8bit.get_qmap_signed()),
        "map|u8": torch.tensor(subclass_8bit.get_qmap_unsigned()),
        "map|s4": torch.tensor(subclass_4bit.get_qmap_signed()),
        "map|u4": torch.tensor(subclass_4bit.get_qmap_unsigned()),
    }
    for make in (rows, bf16_sr, states, steps):
        out.update(make())
    path = os.path.join(os.path.dirname(__file__), "..", "..", "test", "golden", "optim.safetensors")
    save_file({k: t.contiguous() for k, t in out.items()}, path)
    print(f"{len(out)} tensors, {os.path.getsize(path)} bytes")


main()
