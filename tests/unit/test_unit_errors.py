"""Every problem that a user can mend carries its remedy and the exit code of a refusal."""

import pytest

from ccmdist import errors
from ccmdist.errors import CcmdistError, Preempted

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CcmdistError)]


def test_the_exit_codes_are_the_contract_with_batch_scripts():
    codes = (errors.EXIT_DONE, errors.EXIT_INTERNAL, errors.EXIT_REQUEUE, errors.EXIT_REFUSED)
    assert codes == (0, 70, 75, 78)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_the_message_and_then_the_remedy(kind):
    assert str(kind("a.yaml: wrong", "write it anew")) == "a.yaml: wrong; write it anew"
    assert str(kind("a.yaml: wrong")) == "a.yaml: wrong"
    assert (kind("a", "b").message, kind("a", "b").remedy) == ("a", "b")


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_stop_by_signal_asks_to_be_run_again(kind):
    assert kind("x").exit_code == (75 if kind is Preempted else 78)


def fail_with(kind):
    raise kind("a.yaml: wrong", "write it anew")


def test_a_problem_in_another_process_keeps_its_kind_and_text(forkserver):
    with forkserver.Pool(1) as pool:
        for kind in KINDS:
            with pytest.raises(CcmdistError) as problem:
                pool.apply(fail_with, (kind,))
            assert type(problem.value) is kind
            assert str(problem.value) == "a.yaml: wrong; write it anew"
