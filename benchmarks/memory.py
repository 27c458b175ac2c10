"""How much a training step keeps for its backward pass: counted for full-size models, without a GPU or their memory.

    python benchmarks/memory.py                  # a row for each model and precision, with and without checkpointing
    python benchmarks/memory.py --kinds sd_turbo
    python benchmarks/memory.py --kinds rollout  # what an epoch's trajectories take, measured here; Linux only

The networks are built with their real shapes on torch's `meta` device, where tensors have a size but no content,
and every tensor that autograd stores for the backward pass is counted once. With gradient checkpointing, what the
largest block stores while it is computed again is added. Attention counts as on a GPU, by what fused kernels store:
queries, keys, values and result, not the matrix between them. Other kernels may store more or less, so this is an
estimate. The numbers are those of `sdpo_nb.plan.model_sizes`. One JSON line a row goes to `--output`.

`rollout` is measured: an epoch of latents as large as those of SD-Turbo, with a network and a reward that cost
nothing, in this process; the peak of its resident memory during each part of the epoch, less what it held before,
is divided by the size of latents and predicted clean samples. `list` keeps all batches until they are joined, as a
plain concatenation does; `iterator` is what the trainer does.
"""

import argparse
import gc
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from peft import LoraConfig
from random_models import full_width, kinds
from torch.autograd.graph import saved_tensors_hooks

from sdpo_nb.batching import Rollout
from sdpo_nb.branch import BranchConfig, BranchTrainer
from sdpo_nb.config import TrainConfig
from sdpo_nb.files import append_jsonl, read_jsonl
from sdpo_nb.lora import switch_adapters
from sdpo_nb.models import load_policy
from sdpo_nb.trainer import Trainer
from sdpo_nb.tree import Tree

GB = 1e9
with_unet = ["sd_turbo", "sdxl_turbo", "lcm"]
flows = ["sd35_turbo", "flux_schnell", "sana_sprint", "zimage_turbo"]
precisions = {"fp16": torch.float16, "fp32": torch.float32}
of_transformers = (JointTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock, SanaTransformerBlock)
blocks_of = (BasicTransformerBlock, ResnetBlock2D, *of_transformers, ZImageTransformerBlock)


class FusedAttention(torch.autograd.Function):
    "Stores what a fused attention kernel stores, and computes nothing"

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


def fused_attention(query, key, value, **_):
    return FusedAttention.apply(query, key, value)


def millions(module):
    return round(sum(p.numel() for p in module.parameters()) / 1e6)


def inputs(unet, samples):
    "What the UNet reads, on the meta device"
    config, options = unet.config, dict(device="meta", dtype=unet.conv_in.weight.dtype)
    size, states = config.sample_size, torch.empty(samples, 77, config.cross_attention_dim, **options)
    given = dict(
        sample=torch.empty(samples, config.in_channels, size, size, **options),
        timestep=torch.zeros(samples, device="meta", dtype=torch.long),
        encoder_hidden_states=states,
    )
    if config.addition_embed_type:
        given["added_cond_kwargs"] = dict(
            text_embeds=torch.empty(samples, config.projection_class_embeddings_input_dim - 6 * 256, **options),
            time_ids=torch.empty(samples, 6, **options),
        )
    if config.time_cond_proj_dim:
        given["timestep_cond"] = torch.empty(samples, config.time_cond_proj_dim, **options)
    return given


def flow_inputs(kind, size, samples):
    "What a transformer reads in bfloat16, for pictures of `size` pixels; prompts as long as the pipeline makes them"
    empty = lambda *shape: torch.empty(*shape, device="meta", dtype=torch.bfloat16)
    given, times = dict(return_dict=False), torch.zeros(samples, device="meta")
    if kind == "zimage_turbo":  # its prompts are as long as they are: 128 tokens is a long one
        pictures = [empty(16, 1, size // 8, size // 8) for _ in range(samples)]
        return given | dict(x=pictures, t=times, cap_feats=[empty(128, 2560) for _ in range(samples)])
    given |= dict(timestep=times)
    if kind == "sana_sprint":
        given |= dict(hidden_states=empty(samples, 32, size // 32, size // 32), guidance=empty(samples))
        mask = torch.ones(samples, 300, device="meta")
        return given | dict(encoder_hidden_states=empty(samples, 300, 2304), encoder_attention_mask=mask)
    if kind == "sd35_turbo":
        given |= dict(hidden_states=empty(samples, 16, size // 8, size // 8), pooled_projections=empty(samples, 2048))
        return given | dict(encoder_hidden_states=empty(samples, 333, 4096))
    tokens = (size // 16) ** 2
    given |= dict(hidden_states=empty(samples, tokens, 64), pooled_projections=empty(samples, 768))
    given |= dict(img_ids=empty(tokens, 3), txt_ids=empty(256, 3))
    return given | dict(encoder_hidden_states=empty(samples, 256, 4096))


def kept(unet, samples=2, given=None) -> tuple:
    "Bytes a sample that the backward pass needs, and those of the block that needs most"
    weights, seen, total, blocks = {p.untyped_storage()._cdata for p in unet.parameters()}, {}, [0], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in seen:
            seen[storage._cdata] = tensor  # alive, so that its address is not used again
            total[0] += storage.nbytes()
        return tensor

    def before(module, *_):
        blocks[module] = -total[0]

    def after(module, *_):
        blocks[module] += total[0]

    parts = [module for module in unet.modules() if isinstance(module, blocks_of)]
    handles = [
        handle
        for module in parts
        for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after))
    ]
    with (
        patch("torch.nn.functional.scaled_dot_product_attention", fused_attention),
        saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        unet(**(given or inputs(unet, samples)))
    for handle in handles:
        handle.remove()
    return total[0] / samples, max(blocks.values()) / samples


def flow_rows(kind):
    "A flow model in bfloat16, for pictures of two sizes"
    with init_empty_weights(include_buffers=True):
        pipeline = kinds[kind](full_width, 1024)
    texts = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part is not None]
    network = pipeline.transformer.requires_grad_(False).eval()
    sizes = dict(transformer=millions(network), vae=millions(pipeline.vae), text=sum(map(millions, texts)))
    network.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    network.to(torch.bfloat16)
    switch_adapters(network, ["default"], ["default"])
    for size in (512, 1024):
        network.disable_gradient_checkpointing()
        whole, block = kept(network, 2, flow_inputs(kind, size, 2))
        network.enable_gradient_checkpointing()
        again = kept(network, 2, flow_inputs(kind, size, 2))[0] + block
        numbers = dict(gb_per_sample=round(whole / GB, 2), gb_per_sample_checkpointed=round(again / GB, 2))
        yield dict(kind=kind, precision="bf16", size=size, millions=sizes, **numbers)


def rows(kind):
    "A model in each precision"
    if kind in flows:
        yield from flow_rows(kind)
        return
    with init_empty_weights():
        pipeline = kinds[kind](full_width, 512)
    texts = [
        module for name, module in pipeline.components.items() if name.startswith("text_encoder") and module is not None
    ]
    sizes = dict(unet=millions(pipeline.unet), vae=millions(pipeline.vae), text=sum(map(millions, texts)))
    unet = pipeline.unet.requires_grad_(False).eval()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for precision, dtype in precisions.items():
        unet.to(dtype)
        switch_adapters(unet, ["default"], ["default"])  # its weights in float32, computed in the type of the layer
        unet.disable_gradient_checkpointing()
        whole, block = kept(unet)
        unet.enable_gradient_checkpointing()
        yield dict(
            kind=kind,
            precision=precision,
            millions=sizes,
            gb_per_sample=round(whole / GB, 2),
            gb_per_sample_checkpointed=round((kept(unet)[0] + block) / GB, 2),
        )


# --- the rollout, measured -----------------------------------------------------------------------


@contextmanager
def peak(found, name):
    "Notes the largest resident memory inside the block, in bytes"
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    yield
    lines = Path("/proc/self/status").read_text().splitlines()
    found[name] = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def resident() -> int:
    return 1024 * int(Path("/proc/self/statm").read_text().split()[1]) * 4


class Light:
    "A network and a reward without any work"

    def __init__(self, trainer):
        trainer.policy.size = 64 * trainer.policy.pipeline.vae_scale_factor
        trainer.policy.predict = lambda x, *_: x.float()
        trainer.score_latents = lambda latents, *_, **__: latents.new_zeros(len(latents), dtype=torch.float32)


def rollout_rows():
    "Peaks of both kinds of trajectories, and of joining them as a list"
    policy = load_policy("tiny", device="cpu")
    sizes = dict(pairs_per_epoch=64, pairs_per_update=8, micro_batch=8, num_steps=20, eval_samples=0)
    kinds_of = {"pairs": (Trainer, TrainConfig(**sizes)), "trees of two": (BranchTrainer, BranchConfig(**sizes))}
    with TemporaryDirectory() as folder:
        for name, (kind, config) in kinds_of.items():
            for joined in ("iterator", "list"):
                trainer = kind(policy, "warmth", "shapes", replace(config, output_dir=folder), callbacks=[])
                Light(trainer)
                owner = {"pairs": Rollout, "trees of two": Tree}[name]
                plain = owner.cat
                late = classmethod(lambda cls, parts, number: plain([*parts], number))
                with patch.object(owner, "cat", late) if joined == "list" else nullcontext():
                    yield dict(kind="rollout", of=name, joined=joined, **epoch_peaks(trainer))


def epoch_peaks(trainer) -> dict:
    "Of sampling, scoring and the choice of the first update, in units of the rollout"
    gc.collect()
    found, before = {}, resident()
    trainer.begin_epoch()
    with peak(found, "sampling"):
        rollout = trainer.sample()
    size = rollout.latents.nbytes + rollout.pred_x0.nbytes
    if rollout.actions.untyped_storage()._cdata != rollout.latents.untyped_storage()._cdata:
        size += rollout.actions.nbytes + rollout.states.nbytes
    with peak(found, "scoring"):
        trainer.score(rollout)
        trainer.credit(rollout)
    times = {name: round((value - before) / size, 2) for name, value in found.items()}
    return dict(gb=round(size / GB, 3), times_the_rollout=times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=with_unet + flows, choices=with_unet + flows + ["rollout"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.jsonl")
    options = parser.parse_args()
    known = read_jsonl(options.output) if options.output.is_file() else []
    options.output.unlink(missing_ok=True)  # the rows are counted, not measured: the same on any machine
    for row in known:  # of models that are not counted anew
        if row["kind"] not in options.kinds:
            append_jsonl(options.output, row)
    for kind in options.kinds:
        for row in rollout_rows() if kind == "rollout" else rows(kind):
            append_jsonl(options.output, row)
            if kind == "rollout":
                print(row, flush=True)
                continue
            size = row.get("size", 512)
            print(
                f"{kind:<13}{row['precision']} {size:>5} pixels {row['gb_per_sample']:6.2f} GB a sample, "
                f"{row['gb_per_sample_checkpointed']:5.2f} GB with gradient checkpointing   {row['millions']}",
                flush=True,
            )
