"""What the log is told of a split skill's tail."""

from edge_agent.whereabouts import CHANGES_WITHIN_S, MAX_CHANGES, Watch

AWAY = {"where": "local", "cut": "local", "tail": "the tail does not answer"}
THERE = {"where": "split", "cut": "c2", "tail": ""}
LATE = {"where": "continued", "cut": "c2"}


def test_a_tail_that_goes_is_told_once_and_its_return_once() -> None:
    watch = Watch()
    told = [watch.note("photos", header, 0.0) for header in (THERE, LATE, AWAY, AWAY, LATE, AWAY, THERE, LATE, THERE)]
    assert told == [None, None, "the tail does not answer", None, None, None, "", None, None]


def test_staying_local_by_choice_is_no_absence() -> None:
    watch = Watch()
    assert watch.note("photos", {"where": "local", "cut": "local", "tail": ""}, 0.0) is None
    assert (watch.last["photos"].where, watch.last["photos"].away) == ("local", "")


def test_a_tail_that_comes_and_goes_tells_a_few_lines_and_at_last_how_it_is() -> None:
    watch = Watch()
    told = [watch.note("photos", AWAY if at % 2 else THERE, float(at)) for at in range(100)]
    assert len([line for line in told if line is not None]) == MAX_CHANGES
    assert watch.note("photos", AWAY, CHANGES_WITHIN_S + 100) == "the tail does not answer"


def test_a_skill_that_is_no_longer_split_is_forgotten() -> None:
    watch = Watch()
    watch.note("photos", AWAY, 0.0)
    watch.note("photos", {"where": "local", "cut": "local"}, 1.0)
    assert watch.last == {}
