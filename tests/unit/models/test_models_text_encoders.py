"""Prompts go through text encoders as stock pipelines send them; what would go wrong silently is refused."""

import json
import shlex

import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, CLIPTextConfig, CLIPTextModel

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.prompts import FIELD_WORDS, NEGATIVE_PROMPT, prompt
from ccmdist.errors import ConfigError, ModelError
from ccmdist.models.text_encoders import TextEncoder, chosen_text_encoder, tiny_text_encoder, tiny_tokenizer

PROMPTS = [prompt(group, {}) for group in (None, *CLINICAL_GROUPS)]


def saved(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def tiny_clip():
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
        projection_dim=32,
        eos_token_id=tokenizer.sep_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPTextModel(config).eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    tiny = tiny_text_encoder()
    return saved(tmp_path_factory.mktemp("bert"), tiny.model, tiny.tokenizer)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("clip"), tiny_clip())


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_embeddings_are_those_of_the_stock_pipeline_bit_for_bit(request, kind):
    """Of one prompt at a time: pipelines encode a prompt alone too."""
    encoder = chosen_text_encoder(request.getfixturevalue(kind), 64)
    assert encoder.model.config.use_attention_mask == (kind == "bert"), "what reads both ways must not read padding"
    pipe = StableDiffusionPipeline(
        None, encoder.model, encoder.tokenizer, None, None, None, None, requires_safety_checker=False
    )
    for text in (*PROMPTS, NEGATIVE_PROMPT):
        expected, _ = pipe.encode_prompt(text, "cpu", 1, False)
        (found,) = encoder.encode([text], [])
        assert found.shape == (48, 32)
        assert torch.equal(found, expected[0])


def test_the_negative_prompt_is_what_stock_pipelines_take_for_none():
    encoder = tiny_text_encoder()
    assert torch.equal(*encoder.encode(["", NEGATIVE_PROMPT], []))


def test_an_embedding_does_not_depend_on_the_prompts_beside_it_and_tells_groups_apart():
    encoder, alone = tiny_text_encoder(), tiny_text_encoder()
    found = encoder.encode([PROMPTS[1], *PROMPTS], [])
    assert torch.equal(found[0], found[2])
    for text, embedding in zip(PROMPTS, found[1:], strict=True):
        assert torch.equal(alone.encode([text], [])[0], embedding)
    assert all(not torch.equal(found[1], other) for other in found[2:])


def test_the_tiny_tokenizer_knows_every_word_of_our_prompts_and_gives_groups_equal_lengths():
    tokenizer = tiny_tokenizer()
    fields = {name: next(iter(codes)) for name, codes in FIELD_WORDS.items()}
    for group in (None, *CLINICAL_GROUPS):
        words = tokenizer.tokenize(prompt(group, fields))
        assert not [word for word in words if word.startswith(("##", "[UNK]"))]
    assert len({len(tokenizer(text)["input_ids"]) for text in PROMPTS}) == 1
    assert tokenizer.decode(tokenizer("Zebra 7!")["input_ids"], skip_special_tokens=True) == "zebra 7!"


def test_what_is_written_is_read_back_bit_for_bit(bert):
    read = chosen_text_encoder(bert, 64)
    assert torch.equal(read.encode(PROMPTS[:1], [])[0], tiny_text_encoder().encode(PROMPTS[:1], [])[0])


def test_a_longer_prompt_than_the_encoder_takes_is_refused_and_never_cut(bert):
    encoder = chosen_text_encoder(bert, 32)
    assert encoder.num_tokens == 32
    long = PROMPTS[0] + " nerve" * 10
    with pytest.raises(ConfigError) as problem:
        encoder.encode([long], [])
    count = len(tiny_tokenizer()(long)["input_ids"])
    assert f"has {count} tokens, the text encoder (BertModel) takes 32; train msdm_vae with a larger" in str(
        problem.value
    )
    assert chosen_text_encoder(bert, 512).num_tokens == 48, "it has no more positions"


def test_a_checkpoint_of_masked_language_modelling_will_do_and_is_the_same_every_time(tmp_path):
    """Published ones hold a head that is not wanted, and often lack the pooler, which nothing reads."""
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
    )
    folder = saved(tmp_path / "mlm", BertForMaskedLM(config), tokenizer)
    first, second = (chosen_text_encoder(folder, 64).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not first["pooler.dense.weight"].any()


BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 48}
CLIP_TEXT = BERT | {"max_position_embeddings": 48, "projection_dim": 16}
CLIP_VISION = BERT | {"image_size": 32, "patch_size": 16, "projection_dim": 16}
PUBLISHED = {
    "BertForMaskedLM": ("bert", {**BERT, "max_position_embeddings": 48}),
    "BertForPreTraining": ("bert", {**BERT, "max_position_embeddings": 48}),
    "RobertaForMaskedLM": ("roberta", {**BERT, "max_position_embeddings": 50, "pad_token_id": 1}),
    "DistilBertForMaskedLM": ("distilbert", DISTILBERT),
    "CLIPTextModelWithProjection": ("text_model", CLIP_TEXT),
    "CLIPModel": ("text_model", {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 16}),
}
"""Class of a published checkpoint -> where the text model lies in it, and a small config."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_of_a_folder_as_it_is_published_every_weight_of_the_text_model_comes_to_its_place(name, tmp_path):
    """Published are whole models: with heads, with a picture's tower, their names behind a prefix."""
    (part, settings), cls, tokenizer = PUBLISHED[name], getattr(transformers, name), tiny_tokenizer()
    if "text_config" in settings:
        settings = settings | {"text_config": settings["text_config"] | {"vocab_size": len(tokenizer)}}
    else:
        settings = settings | {"vocab_size": len(tokenizer)}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = cls(cls.config_class(**settings)).eval()
    encoder = chosen_text_encoder(saved(tmp_path / "whole", model, tokenizer), 64)
    expected, found = getattr(model, part), encoder.model
    assert encoder.num_tokens == 48
    placed = {name for name, tensor in expected.state_dict().items() if torch.equal(tensor, found.state_dict()[name])}
    assert found.state_dict().keys() - placed <= {"pooler.dense.weight", "pooler.dense.bias"}
    given = tokenizer(PROMPTS[0], padding="max_length", max_length=48, return_tensors="pt")
    mask = given["attention_mask"] if found.config.use_attention_mask else None
    with torch.no_grad():
        states = expected(given["input_ids"], attention_mask=mask).last_hidden_state[0]
    assert torch.equal(encoder.encode(PROMPTS[:1], [])[0], states)


def test_a_tokenizer_that_is_a_list_of_words_alone_is_read_as_old_checkpoints_have_it(tmp_path, bert):
    folder = saved(tmp_path / "old", tiny_text_encoder().model)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    words = sorted(tiny_tokenizer().get_vocab().items(), key=lambda one: one[1])
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words))
    old, new = chosen_text_encoder(folder, 40), chosen_text_encoder(bert, 40)
    assert old.num_tokens == new.num_tokens == 40
    assert torch.equal(old.encode(PROMPTS[:1], [])[0], new.encode(PROMPTS[:1], [])[0])


def test_a_checkpoint_that_is_a_pickle_alone_is_refused_and_the_remedy_makes_one_that_is_read(tmp_path):
    folder = saved(tmp_path / "pickle", tiny_text_encoder().model)
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert message.startswith(
        f"{folder}: has its weights as pytorch_model.bin alone, a pickle, and pickles are not read"
    )
    command = shlex.split(message.partition("to safetensors: ")[2])
    assert command[:2] == ["python", "-c"]
    exec(command[2])
    found = chosen_text_encoder(folder, 48).model.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def refusal(folder):
    with pytest.raises(ModelError) as problem:
        TextEncoder.load(folder, folder, torch.float32, "cpu")
    return str(problem.value)


def test_folders_that_hold_no_text_encoder_are_refused(tmp_path, bert):
    assert refusal(tmp_path / "none").startswith(
        f"{tmp_path / 'none'}: there is no such folder; name a local folder of a BERT or CLIP"
    )
    (empty := tmp_path / "empty").mkdir()
    assert refusal(empty).startswith(f"{empty}: cannot be read (")
    pointer = saved(tmp_path / "pointer", tiny_text_encoder().model)
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert refusal(pointer).startswith(f"{pointer}: cannot be read (")
    other = saved(tmp_path / "other", tiny_text_encoder().model)
    file = other / "config.json"
    file.write_text(json.dumps({"model_type": "gpt2"}))
    assert f"{other}: is a model of type gpt2, expected bert, roberta" in refusal(other)


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path, bert):
    folder = saved(tmp_path / "cut", tiny_text_encoder().model)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, file, {"format": "pt"})
    assert f"{folder}: missing weights, such as encoder.layer.0.output.dense.weight; name a local folder" in refusal(
        folder
    )
