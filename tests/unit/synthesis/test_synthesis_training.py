"""A synthetic set says whom its generator has seen, so that nobody is tested who was trained on."""

from ccmdist.data.cache_index import find_cache, source_set_digest
from ccmdist.data.manifest import read_manifest
from ccmdist.data.trained_on import subjects_trained_on, training_of
from ccmdist.models.model_folder import ModelFolder


def test_a_run_knows_the_set_that_its_cache_was_made_of(sources, config, tmp_path):
    data = config().data
    digest = read_manifest(data.shards).digest
    _, cache_digest = find_cache(data, digest, ModelFolder.open(data.model).encoder_identity())
    assert source_set_digest(data, cache_digest) == digest
    assert source_set_digest(data, digest) == digest  # trained on the shards themselves
    assert source_set_digest(data, cache_digest[:16] + 48 * "0") == "unknown"
    assert source_set_digest(data.model_copy(update={"cache": tmp_path}), cache_digest) == "unknown"


def test_a_set_names_the_training_subjects_of_its_generator(sources, drawn):
    assert read_manifest(drawn).about["training"] == "untuned"
    source = read_manifest(sources / "shards")
    facts = {"training_set_digest": source.digest, "training_split": "train"}
    expected = {"set_digest": source.digest, "split": "train", "subjects": ["s5", "s6"]}
    assert training_of(facts, source) == expected


def test_a_generator_that_was_trained_elsewhere_or_does_not_say_where_has_no_known_subjects(sources):
    source = read_manifest(sources / "shards")
    elsewhere = training_of({"training_set_digest": "d" * 64, "training_split": "train"}, source)
    assert elsewhere == {"set_digest": "d" * 64, "split": "train", "subjects": None}
    assert training_of({}, source) == {"set_digest": "unknown", "split": "train", "subjects": None}


def test_who_was_trained_on_is_read_from_the_manifest_of_what_was_drawn(sources, drawn):
    untuned, source = read_manifest(drawn), read_manifest(sources / "shards")

    def said(training):
        return subjects_trained_on(untuned.model_copy(update={"about": {"training": training}}), [source])

    of_source = {"set_digest": source.digest, "split": "train"}
    assert subjects_trained_on(untuned, []) == frozenset()
    assert said(training_of({"training_set_digest": source.digest}, source)) == {"s5", "s6"}
    assert said({**of_source, "subjects": ["p1"]}) == {"p1"}, "what is said outweighs what could be looked up"
    assert said({**of_source, "subjects": None}) == {"s5", "s6"}
    for nothing in (None, "adapter", {}, {"set_digest": source.digest}, {**of_source, "set_digest": "d" * 64}):
        assert said(nothing) is None, nothing
