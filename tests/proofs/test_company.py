"""group == alone, batch == alone: a sample does not depend on what runs beside it."""

import pytest
import torch
from tests.pairs import rest_slow
from tests.proofs.cases import Case, cases
from tests.proofs.conftest import AloneOf, EngineOf
from tests.proofs.doors import assert_same_samples, together


@pytest.mark.parametrize("case", rest_slow(cases(layout="single")))
def test_every_sample_has_the_bits_that_it_has_alone(case: Case, engine_of: EngineOf, alone_of: AloneOf) -> None:
    answers = together(engine_of(case.family, case.dtype), case.requests)
    for request, answer in zip(case.requests, answers, strict=True):
        assert_same_samples(answer, alone_of(case.family, case.dtype, request))


@pytest.mark.parametrize("case", rest_slow(cases(layout="single", company="group"), later=3))
def test_the_samples_of_a_group_differ(case: Case, alone_of: AloneOf) -> None:
    images = [rollout.image for rollout in alone_of(case.family, case.dtype, case.request)]
    assert not torch.equal(images[0], images[1])
