"""How much of a model ZeRO-3 may hold gathered."""

from ccmdist.train.engine import _gathering_one_block_ahead
from ccmdist.train.mdf_network import make_mdf_mllm
from tests.small_mdf import make_mllms, small


def test_a_frozen_language_model_is_gathered_module_by_module_and_never_whole(tmp_path):
    """As of 11 B parameters, which a bound of the whole model would let lie on every rank."""
    make_mllms(tmp_path)
    model = make_mdf_mllm(small(tmp_path / "mllama"), 64, 0)
    trained = [p for parameters in model.parameter_sets().values() for p in parameters.values()]
    found = _gathering_one_block_ahead({"zero_optimization": {"stage": 3}}, model, trained)["zero_optimization"]
    largest = max(p.numel() for p in model.llm.parameters() if not p.requires_grad)
    assert found["stage"] == 3
    for name in ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance"):
        assert largest <= found[name] < 1.1 * largest, name
    assert found["stage3_max_live_parameters"] == 2 * found["stage3_prefetch_bucket_size"]
