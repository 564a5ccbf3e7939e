"""Writes diffusion.safetensors: noise schedules and samples of diffusers' schedulers, with a stand-in for a network.

Run in an environment with diffusers; the project needs none.
"""

import itertools
import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm
from safetensors.torch import save_file

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
PREDICTIONS = {"epsilon": "epsilon", "sample": "sample", "v": "v_prediction"}


def main() -> None:
    torch.manual_seed(0)
    tensors = {"in/matrix": torch.randn(3, 3), "in/noise": torch.randn(2, 6, 3), "in/draws": torch.randn(99, 2, 6, 3)}
    cases = []
    for (sampler, kind), (said, prediction), (schedule, training, steps) in itertools.product(
        SCHEDULERS.items(),
        PREDICTIONS.items(),
        (("squaredcos_cap_v2", 100, 10), ("linear", 100, 7), ("squaredcos_cap_v2", 1000, 5), ("linear", 50, 49)),
    ):
        settings = {"num_train_timesteps": training, "beta_schedule": schedule, "prediction_type": prediction}
        if sampler != "dpmsolver++":
            settings |= {"clip_sample": True, "clip_sample_range": 0.9}
        scheduler = kind(**settings)
        scheduler.set_timesteps(steps)
        tensors[f"out/bars/{schedule}/{training}"] = scheduler.alphas_cumprod
        draws = iter(tensors["in/draws"])
        scheduling_ddpm.randn_tensor = lambda *args, draws=draws, **kwargs: next(draws)
        x = tensors["in/noise"]
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x @ tensors["in/matrix"] + 0.01 * t), t, x).prev_sample
        name = f"out/{sampler}/{said}/{schedule}/{training}/{steps}"
        tensors[name] = x
        tensors[f"{name}/times"] = scheduler.timesteps.float()
        cases.append(name)
    path = Path(__file__).with_name("diffusion.safetensors")
    metadata = {"reference": "diffusers", "config": json.dumps({"cases": cases, "clip": 0.9})}
    save_file({name: value.float().contiguous() for name, value in tensors.items()}, path, metadata)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
