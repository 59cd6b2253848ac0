"""What a rank holds and receives in a real training step, counted where DeepSpeed calls the network."""

import dataclasses
from collections import Counter

from tests.distributed.small_engine import built, steps

NUM_STEPS = 3


def counted_in_turn(group, world, overrides_by_name):
    """What :func:`counted` gives for several runs, one after the other."""
    return {name: counted(group, world, *overrides) for name, overrides in overrides_by_name.items()}


def counted(group, world, *overrides):
    """Bytes received per optimizer step, by kind and bytes of an element, and bytes held; and what was planned."""
    from ccmdist.planner.memory import block_bytes, cut_bytes, memory
    from ccmdist.planner.traffic import traffic
    from ccmdist.planner.transformer import Transformer

    config, objective, engine = built(group, world, *overrides)
    steps(config, objective, engine, 0, NUM_STEPS)  # DeepSpeed traces the first steps, and gathers more in them
    received = Counter()
    with counting(received):
        steps(config, objective, engine, NUM_STEPS, 2 * NUM_STEPS)
    model = Transformer.from_config(objective.folder.config("transformer"))
    ranks = group.ranks.world_size
    planned = traffic(config, model, config.sharding, ranks, ranks)
    need = memory(config, model, of_sample(objective), config.sharding, ranks, ranks)
    return {
        "received": {kind: num_bytes / NUM_STEPS for kind, num_bytes in received.items()},
        "held": held(engine),
        "traffic": dataclasses.asdict(planned),
        "memory": dataclasses.asdict(need),
        "block_bytes": block_bytes(config, model),
        "outer_bytes": cut_bytes(config, model) - model.num_layers * block_bytes(config, model),
    }


def of_sample(objective):
    """Tokens of a sample of the small world."""
    from ccmdist.planner.flops import tokens

    return tokens(objective.config.data.image_size_px, num_text=objective.entries[0].num_text_tokens)


def held(engine):
    """Bytes of frozen weights, of partitions of the adapter and of its moments on this rank."""
    trained = {id(parameter) for _, parameter in engine._named_parameters()}
    frozen = [p for p in engine.module.parameters() if id(p) not in trained]
    frozen_bytes = sum(p.ds_tensor.nbytes for p in frozen)
    frozen_bytes += sum(b.nbytes for n, b in engine.module.named_buffers() if n.endswith(("weight", "bias")))
    return {
        "frozen": frozen_bytes,
        "partitions": sum(p.ds_tensor.nbytes for _, p in engine._named_parameters()),
        "masters": sum(flat.nbytes for flat in engine._flat_by_set().values()),
        "gradients": engine._zero.grad_partitions_flat_buffer.nbytes,
        "bucket": sum(bucket.buffer.nbytes for bucket in engine._zero.ipg_buckets.values()),
        "moments": sum(
            tensor.nbytes
            for flat in engine._flat_by_set().values()
            for name, tensor in engine.optimizer.state[flat].items()
            if name != "step"
        ),
    }


def counting(received):
    """While it is entered, bytes that collectives of DeepSpeed bring this rank, by kind and element size."""
    import contextlib
    from unittest import mock

    import torch.distributed as dist
    from deepspeed.comm.torch import TorchBackend

    def noting(kind, original, of_result):
        def call(self, *args, **kwargs):
            tensors = of_result(args, kwargs)
            for tensor in tensors if isinstance(tensors, list | tuple) else [tensors]:
                ranks = dist.get_world_size(kwargs.get("group"))
                received[f"{kind} {tensor.element_size()}"] += tensor.nbytes * (ranks - 1) / ranks
            return original(self, *args, **kwargs)

        return call

    def first(name):
        return lambda args, kwargs: args[0] if args else kwargs[name]

    def second(name):
        return lambda args, kwargs: args[1] if len(args) > 1 else kwargs[name]

    noted = {
        "all_gather_into_tensor": ("gathered", first("output_tensor")),
        "all_gather_coalesced": ("gathered", first("output_tensors")),
        "all_gather": ("gathered", first("tensor_list")),
        "reduce_scatter_tensor": ("reduced", second("input_tensor")),
        "reduce_scatter": ("reduced", second("input_list")),
        "all_reduce": ("reduced", first("tensor")),
    }
    stack = contextlib.ExitStack()
    for name, (kind, of_result) in noted.items():
        replacement = noting(kind, getattr(TorchBackend, name), of_result)
        stack.enter_context(mock.patch.object(TorchBackend, name, replacement))
    return stack
