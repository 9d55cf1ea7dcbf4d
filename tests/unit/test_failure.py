"""What ranks find out about a failure, in one process: notes in a store, and one verdict."""

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from distmuon.failure import RollCall, Topic, Verdict, explain, within


def on_threads(notes: dict[int, tuple[str, tuple[int, ...]]], world_size: int) -> dict[int, Any]:
    """Every rank in `notes` answers with its place and the ranks it found gone."""
    store = dist.HashStore()
    verdicts: dict[int, Any] = {}

    def rank_main(rank: int) -> None:
        call = RollCall(store, rank, world_size)
        call.answer(*notes[rank])
        verdicts[rank] = call.verdict()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in notes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return verdicts


def test_all_ranks_get_one_verdict() -> None:
    # Rank 0 closed its connections after it had left its note: it is not gone, rank 2 is.
    verdicts = on_threads({0: ("agree", (2,)), 1: ("agree", (0,)), 3: ("agree", ())}, 4)
    assert set(verdicts.values()) == {Verdict((2,), "gone", "ranks [0, 1, 3] in agree")}


def test_who_leaves_no_note_is_silent() -> None:
    verdicts = on_threads({0: ("agree", ()), 2: ("agree", ())}, 3)
    assert {verdict[:2] for verdict in verdicts.values()} == {((1,), "silent")}


def test_when_all_answer_their_places_are_told_and_nothing_is_waited_for() -> None:
    began = time.monotonic()
    verdicts = on_threads({0: ("agree", ()), 1: ("clip", ())}, 2)
    assert time.monotonic() - began < 1.0
    assert set(verdicts.values()) == {Verdict((), "apart", "ranks [0] in agree; ranks [1] in clip")}


def test_an_error_of_one_ranks_own_is_the_verdict_unless_another_came_first() -> None:
    store = dist.HashStore()
    first, second = RollCall(store, 0, 2), RollCall(store, 1, 2)
    first.answer("step 1", ())
    first.blame_me("ValueError: no")
    second.answer("step 1", ())
    second.blame_me("KeyError: later")
    assert second.verdict() == Verdict((0,), "raised", "ValueError: no")


def test_a_store_that_never_answers_cannot_hold_a_rank_up() -> None:
    began = time.monotonic()
    assert within(0.2, threading.Event().wait) is None
    assert time.monotonic() - began < 1.0
    assert within(1.0, lambda: 3) == 3
    assert within(1.0, lambda: {}[0]) is None


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (Verdict((1,), "gone", ""), "ranks [1] of the process group (global ranks [5]) are gone"),
        (Verdict((0,), "silent", "x"), "the other ranks gave up on this rank"),
        (Verdict((), "unknown", ""), "could not be asked"),
        (Verdict((), "apart", "ranks [0] in agree; ranks [1] in clip"), "the same program"),
        (Verdict((), "apart", "ranks [0, 1] in agree"), "came later than"),
    ],
)
def test_a_verdict_is_told_in_ranks_of_the_group_and_of_the_job(
    verdict: Verdict, said: str
) -> None:
    assert said in explain(verdict, 0, [4, 5])


def test_a_topic_names_the_first_parameters() -> None:
    assert str(Topic("gather", 1, ("a", "b", "c", "d"))) == "gather, wave 1 (a, b, c and 1 more)"
    assert str(Topic("agree")) == "agree"
