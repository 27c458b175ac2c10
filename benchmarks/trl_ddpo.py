"""One training of TRL's `DDPOTrainer`, an epoch at a time: the part of time_to_gain.py that runs in TRL's environment.

    python trl_ddpo.py SPEC      # SPEC is a JSON object: see `specification` in time_to_gain.py

It reads `go` or `stop` on its input and writes one JSON line on its output for each epoch: processor seconds inside
`DDPOTrainer.step` so far, calls of the UNet, and counts. The LoRA is saved into `spec["lora"]` before the line is
written; saving is not counted. Nothing of the training is changed, except for what TRL 0.23.1 needs to run here:

- A `PartialState()` comes first: TRL logs before its own accelerator exists, which accelerate refuses.
- diffusers' `_encode_prompt` joins prompt and negative prompt even where guidance is off, so that the UNet would get
  twice as many texts as latents; here it returns the prompt alone then.
- The scheduler's timesteps have to be trailing, as the model's own are: TRL steps from t to t − 1000 // T.

The reward is this package's, imported by the path in `spec["package"]`.
"""

import json
import os
import random
import sys
import time
from importlib.metadata import version

import torch


class Calls:
    "Counts the calls of a network and the samples in them, with and without a gradient"

    def __init__(self, network):
        self.counts = dict(network_calls=0, network_samples=0, network_samples_with_gradient=0)
        network.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, _, positional, named):
        latents = positional[0] if positional else named["sample"]
        self.counts["network_calls"] += 1
        self.counts["network_samples"] += len(latents)
        self.counts["network_samples_with_gradient"] += len(latents) * torch.is_grad_enabled()


def prompt_alone(pipeline):
    "What `_encode_prompt` gives while guidance is off"

    def encode(*_, prompt_embeds=None, **__):
        return prompt_embeds

    pipeline._encode_prompt = encode


def build(spec):
    "TRL's pipeline and trainer, and the count of network calls"
    from accelerate import PartialState

    PartialState(cpu=True)
    from trl import DDPOConfig, DDPOTrainer
    from trl.models import DefaultDDPOStableDiffusionPipeline

    sys.path.insert(0, spec["package"])
    from sdpo_nb import rewards

    pipeline, draw = DefaultDDPOStableDiffusionPipeline(spec["model"]), random.Random(spec["seed"])
    prompt_alone(pipeline.sd_pipeline)
    rewards.load_text_encoder = lambda: (pipeline.tokenizer, pipeline.text_encoder)  # its own file is of newer versions
    reward = rewards.get_reward(spec["reward"])
    config = DDPOConfig(seed=spec["seed"], accelerator_kwargs=dict(cpu=True), **spec["config"])
    trainer = DDPOTrainer(
        config,
        lambda images, prompts, _: (rewards.checked(reward, images.float(), list(prompts)), {}),
        lambda: (draw.choice(spec["prompts"]), {}),
        pipeline,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, trainer, Calls(pipeline.unet)


def save_lora(pipeline, folder):
    "As TRL saves its checkpoints"
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    pipeline.sd_pipeline.save_lora_weights(folder, unet_lora_layers=layers)


@torch.no_grad()
def probe(pipeline, prompt):
    "What the untrained network says to a fixed input, to be compared with what the same weights say elsewhere"
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    latents = torch.linspace(-1, 1, channels * size * size).view(1, channels, size, size)
    options = dict(padding="max_length", truncation=True, max_length=pipeline.tokenizer.model_max_length)
    ids = pipeline.tokenizer([prompt], return_tensors="pt", **options).input_ids
    output = pipeline.unet(latents, torch.tensor([500]), pipeline.text_encoder(ids)[0]).sample
    return output.flatten()[:: max(1, output.numel() // 16)].tolist()


def main():
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    torch.set_num_threads(1)

    def say(**line):
        print(json.dumps(line), file=answers, flush=True)

    pipeline, trainer, calls = build(spec)
    names = ("trl", "diffusers", "transformers", "accelerate", "peft", "torch")
    say(versions={name: version(name) for name in names}, probe=probe(pipeline, spec["prompts"][0]))
    calls.counts = dict.fromkeys(calls.counts, 0)
    seconds, epoch, updates = 0.0, 0, 0
    batch = spec["config"]["sample_batch_size"] * spec["config"]["sample_num_batches_per_epoch"]
    while sys.stdin.readline().strip() == "go":
        started = time.process_time()
        updates = trainer.step(epoch, updates)
        seconds += time.process_time() - started
        epoch += 1
        save_lora(pipeline, spec["lora"])
        counts = dict(samples=epoch * batch, reward_queries=epoch * batch, optimizer_steps=updates)
        say(epoch=epoch, cpu_seconds=seconds, **calls.counts, **counts)


if __name__ == "__main__":
    main()
