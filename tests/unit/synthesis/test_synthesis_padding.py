"""No padding reaches the model in synthesis: attention sees the tokens that a request has, and nothing else."""

from ccmdist.models import sampling
from ccmdist.synthesis.generate import synthesize
from ccmdist.synthesis.plan import read_plan

NUM_TOKENS, NEGATIVE_LENGTH = 4 * 4, 7


def test_attention_sees_as_many_text_tokens_as_the_prompts_have_and_no_mask(config, one_model, tmp_path, monkeypatch):
    seen, attend = [], sampling.dispatch_attention_fn

    def watched(query, key, value, *, backend):
        seen.append((len(key), key.shape[1] - 2 * NUM_TOKENS))
        return attend(query, key, value, backend=backend)

    monkeypatch.setattr(sampling, "dispatch_attention_fn", watched)
    # Batches of three: of the length that has two masks alone and of the other, with a remainder.
    synthesize(config("batch_size=3"), None)
    batches = read_plan(tmp_path / "out").batches
    assert sorted({batch.num_text_tokens for batch in batches}) == [9, 12]
    num_steps, num_blocks = 2, 4
    expected = [
        (len(batch.requests), length)
        for batch in batches
        for length in [batch.num_text_tokens, NEGATIVE_LENGTH] * num_steps * num_blocks
    ]
    assert seen == expected
