"""Settings of the baselines in the small world, and what the ranks of their tests run."""

from itertools import islice
from pathlib import Path

import torch

from tests.distributed.small_engine import built, slices, steps

OF_NETWORKS = ["adapter=null", "base=null", "optim.lr=2e-3", "optim.ema_decay=0.9"]
SETTINGS_OF = {
    "spade": [
        *OF_NETWORKS,
        "objective={kind: spade, channels: [16, 16], norm_channels: 8, noise_dim: 8, discriminator_channels: 8, "
        "discriminator_layers: 1}",
        "validation.sigmas=[0.1,0.3,0.5,0.7,0.9]",  # as they are where nobody sets them
    ],
    "maisi": [
        *OF_NETWORKS,
        "objective={kind: maisi, channels: [32, 32], norm_groups: 8, num_res_blocks: 1, num_attention_levels: 1, "
        "null_fraction: 0.3}",
    ],
    "msdm_vae": [
        *OF_NETWORKS,
        "objective={kind: msdm_vae, channels: [8, 16, 16], latent_channels: 4, layers_per_block: 1, crop_px: 32}",
        "validation.sigmas=[0.1,0.3,0.5,0.7,0.9]",
    ],
    "msdm": [
        *OF_NETWORKS,  # its dropout is not switched off: it must not depend on the number of ranks either
        "objective={kind: msdm, channels: [32, 32], layers_per_block: 1, norm_groups: 8, num_attention_levels: 1, "
        "heads: 4, cross_attention_dim: 32, null_fraction: 0.3}",
    ],
    "segment": [
        *OF_NETWORKS,
        "objective={kind: segment, channels: [4, 4, 8, 8, 16, 4]}",
        "validation.sigmas=[0.1,0.3,0.5,0.7,0.9]",
    ],
    "diagnose": [  # its language model, data of the machine, is named where it lies
        *OF_NETWORKS,
        "micro_batch_size=2",
        "objective={kind: diagnose, channels: [4, 4, 8, 8, 16, 4], llm_dtype: fp32, lora_rank: 2, token_grid: 4, "
        "fusion_heads: 4}",
        "validation.sigmas=[0.1,0.3,0.5,0.7,0.9]",
    ],
}


def make_mllama(world):
    """A tiny language model beside what the world has: mllama/ in it."""
    from ccmdist.models.make_mllm import make_mllm

    make_mllm("mllama", Path(world) / "mllama")


def make_msdm(world):
    """The encoders of a small MSDM and their cache beside what the world has: msdm/ in it."""
    from ccmdist.config.data import PrecomputeConfig
    from ccmdist.config.loading import load
    from ccmdist.precompute.fill import fill_cache
    from tests.distributed.small_world import IMAGE_SIZE_PX, data_overrides
    from tests.small_msdm import write_encoders

    write_encoders(Path(world) / "msdm", IMAGE_SIZE_PX)
    fill_cache(load(PrecomputeConfig, [], [*data_overrides(world), f"data.model={world}/msdm"]), 0, 1)


def turns(group, world):
    """For two steps of SPADE: the state before and after, how often each set was updated, and the norms told."""
    config, objective, engine = built(group, world, *SETTINGS_OF["spade"], "micro_batch_size=2")
    batches, told = iter(objective.batches(0)), [(slices(engine), engine.adam_steps(), 0.0)]
    for step in range(3):
        engine.begin_step(objective.sets_of_step(step), 1e-2)
        norm = 0.0
        for batch in islice(batches, config.global_batch_size // config.micro_batch_size // group.ranks.world_size):
            engine.backward(objective.loss(engine.module, batch))
            norm = engine.step()
        engine.update_average()
        told.append((slices(engine), engine.adam_steps(), norm))
    return told


def whole_llm(group, world):
    """Of MDF-MLLM all of whose language model is trained: losses of two steps, and its parameters as it was read."""
    from ccmdist.train.engine import zero_config

    given = [*SETTINGS_OF["diagnose"], "objective.llm=full", f"objective.mllm={world}/mllama"]
    config, objective, engine = built(group, world, *given)
    told = [loss for loss, _ in steps(config, objective, engine, 0, 2)]
    read = objective.build(zero_config(config, group.ranks.world_size)).llm
    return told, [(p.ds_numel, p.ds_tensor.ds_numel, p.numel()) for p in read.parameters()]


def norm_of_second_step(group, world):
    """Norm of the gradient of the generator in the second step as the engine tells it, and as autograd has it."""
    config, objective, engine = built(group, world, *SETTINGS_OF["spade"], "micro_batch_size=4")
    batches = iter(objective.batches(0))
    for step in range(2):
        engine.begin_step(objective.sets_of_step(step), 1e-2)
        batch = next(batches)
        weights = {name: local.values["weight"].clone() for name, local in engine.local.items()}
        engine.backward(objective.loss(engine.module, batch))
        told = engine.step()
    _, plain, _ = _unpartitioned(config, group)
    plain.model.load_state_dict(
        {name: weights[name].view(parameter.shape) for name, parameter in plain.model.named_parameters()}
    )
    plain.loss(plain.model, batch).backward()
    grads = {name: parameter.grad for name, parameter in plain.model.named_parameters()}
    norms = {
        part: torch.cat([grad.flatten() for name, grad in grads.items() if name.startswith(part)]).norm()
        for part in ("generator", "discriminator")
    }
    return told, float(norms["generator"]), float(norms["discriminator"])


def _unpartitioned(config, group):
    from ccmdist.train.objectives.choice import objective_of

    objective = objective_of(config, group)
    objective.build({})
    return config, objective, None
