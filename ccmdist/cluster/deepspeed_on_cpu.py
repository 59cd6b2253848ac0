"""DeepSpeed on a machine without GPU, without compiling anything."""


def disable_shm_op() -> bool:
    """Keep DeepSpeed from compiling its shared-memory all-reduce; whether there was something to disable.

    On a CPU host it would be built with g++ at the first ``init_distributed`` (a minute or two), and a process
    killed meanwhile leaves a lock that lets every later run wait for ever. It is an inference feature; gloo serves.
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return False
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        return False
    deepspeed.ops.__compatible_ops__[builder.NAME] = False
    return True
