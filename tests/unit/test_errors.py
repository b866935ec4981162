"""Errors that are kept, and what is raised of them."""

import pytest

from flowroll.errors import FlowrollError, QueueFullError, RankLostError, fresh


def kinds(of: type[FlowrollError] = FlowrollError) -> list[type[FlowrollError]]:
    return [of, *(kind for sub in of.__subclasses__() for kind in kinds(sub))]


@pytest.mark.parametrize("kind", kinds())
def test_a_fresh_error_is_the_same_in_all_but_its_frames(kind: type[FlowrollError]) -> None:
    more = {"retry_after_s": 7.5} if issubclass(kind, QueueFullError) else {}
    try:
        raise kind("a must b, got c; d.", field="a", **more) from ValueError("why")
    except FlowrollError as error:
        other = fresh(error)
        assert other is not error and type(other) is kind and vars(other) == vars(error) and str(other) == str(error)
    assert other.__traceback__ is None and other.__cause__ is None and other.__context__ is None


def test_an_engine_whose_ranks_are_down_keeps_nothing_of_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowroll.engine import Engine
    from flowroll.engine.service import EngineService

    failure = RankLostError("rank 1 must live, got its end; restart it.")
    monkeypatch.setattr(Engine, "failure", failure)
    monkeypatch.setattr(EngineService, "failure", failure)
    service = EngineService.__new__(EngineService)
    service._is_draining = True
    for check in (Engine.__new__(Engine)._check_open, service._check_accepting):
        with pytest.raises(RankLostError) as caught:
            check()
        assert caught.value is not failure
    assert failure.__traceback__ is None
