"""A LoRA computed in half precision against PEFT's way of computing it in float32.

    python benchmarks/lora_dtype.py               # bytes counted at full width, and times on this machine
    python benchmarks/lora_dtype.py --rounds 0    # only the bytes: no arithmetic, a minute

The bytes are those that the operations of SD-Turbo's UNet read and write in bfloat16 at 512×512, counted on torch's
`meta` device, where tensors have a size but no content: each operation reads its inputs and writes its outputs once,
views are free. A GPU that fuses nothing moves so many. The times are process CPU seconds on one thread, both ways
alternating in one run: the median of the ratios, and the smallest and the largest one.
"""

import argparse
import time
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from memory import inputs
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from random_models import full_width, kinds
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdpo_nb.files import append_jsonl
from sdpo_nb.lora import adapter_layers, switch_adapters
from sdpo_nb.models import load_policy

targets = ["to_q", "to_k", "to_v", "to_out.0"]


class BytesMoved(TorchDispatchMode):
    "Adds up what every operation reads and writes"

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        returned = [result.alias_info for result in function._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returned)
        if not view and "empty" not in str(function):
            count(args, kwargs, found)
        return found


def count(*values):
    "Tensors that are read or written"
    BytesMoved.total += sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, torch.Tensor))


class FusedAttention(torch.autograd.Function):
    "Moves what a fused attention kernel moves, and computes nothing"

    @staticmethod
    def forward(ctx, *qkv):
        out = torch.empty_like(qkv[0])
        ctx.save_for_backward(*qkv, out)
        count(qkv, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        gradients = tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])
        count(ctx.saved_tensors, grad, gradients)
        return gradients


def fused_attention(query, key, value, **_):
    return FusedAttention.apply(query, key, value)


def peft_way(network):
    "Every layer computes as PEFT has it; `switch_adapters` is the way back"
    for layer in adapter_layers(network):
        if isinstance(layer, Linear):
            layer.__class__ = Linear


def in_each_way(network, measure):
    "{way: what `measure` finds}"
    peft_way(network)
    found = {"peft": measure()}
    switch_adapters(network, ["default"], ["default"])
    return found | {"here": measure()}


def gigabytes(network, samples=8) -> dict:
    "Read and written for a sample: while sampling, and for a training step's forward and backward pass"

    def sampling():
        BytesMoved.total = 0
        with torch.no_grad(), BytesMoved():
            network(**inputs(network, samples))
        return round(BytesMoved.total / samples / 1e9, 2)

    def training():
        BytesMoved.total = 0
        with BytesMoved():
            network(**inputs(network, samples))[0].sum().backward()
        return round(BytesMoved.total / samples / 1e9, 2)

    with patch("torch.nn.functional.scaled_dot_product_attention", fused_attention):
        network.disable_adapters()
        without = sampling()
        network.enable_adapters()
        return dict(
            sampling=in_each_way(network, sampling) | {"no LoRA": without}, training=in_each_way(network, training)
        )


def full_unet():
    with init_empty_weights():
        network = kinds["sd_turbo"](full_width, 512).unet.requires_grad_(False).eval().to(torch.bfloat16)
    network.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    switch_adapters(network, ["default"], ["default"])
    return network


def seconds(work) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def compared(policy, samples: int, rounds: int) -> dict:
    "CPU seconds of both ways, alternating, and how far apart their gradients are"
    prompts, generator = ["a red circle"] * samples, torch.Generator().manual_seed(0)
    latents, embedding = torch.randn(samples, *policy.latent_shape, generator=generator), policy.embed(prompts)
    policy.add_lora(4)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))

    def sampling():
        with torch.no_grad():
            return policy.predict(latents, 999, embedding)

    def training():
        policy.denoiser.zero_grad()
        policy.predict(latents, 999, embedding).square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in policy.trainable_parameters().values()])

    one, other = in_each_way(policy.denoiser, training).values()
    found = {"gradients apart": round(((one - other).norm() / one.norm()).item(), 4)}
    times = [
        {w.__name__: in_each_way(policy.denoiser, lambda: seconds(w)) for w in (sampling, training)}
        for _ in range(rounds)
    ]
    for name in ("sampling", "training"):
        ratios = sorted(one[name]["peft"] / one[name]["here"] for one in times)
        found[name] = dict(ratio=round(ratios[rounds // 2], 3), least=round(ratios[0], 3), most=round(ratios[-1], 3))
        found[name]["here"] = round(sorted(one[name]["here"] for one in times)[rounds // 2], 4)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", help="a pipeline of `random_models.py` to be timed besides the embedded one")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "lora_dtype.jsonl")
    options = parser.parse_args()
    options.output.unlink(missing_ok=True)
    torch.set_num_threads(1)
    rows = [dict(model="sd_turbo, counted", gigabytes=gigabytes(full_unet()))]
    timed = {"tiny": 16, options.folder: 2} if options.rounds else {}
    for name in filter(None, timed):
        policy = load_policy(name, device="cpu", precision="bf16")
        rows.append(dict(model=Path(name).name, samples=timed[name], **compared(policy, timed[name], options.rounds)))
    for row in rows:
        append_jsonl(options.output, row)
        print(row, flush=True)
