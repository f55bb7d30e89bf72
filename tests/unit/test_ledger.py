"""The ledger: what outcomes are worth, and what may be deleted after which history."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from aioblobcol._ledger import Demand, Facts, Ledger, Settlement, is_refusal, judge
from aioblobcol._statements import Evidence
from aioblobcol.errors import Outcome

NEW, OLD, NEXT = "s3://b/p/new", "s3://b/p/old", "s3://b/p/next"
NOTHING_TO_DO = Settlement((), (), (), ())


def insert(ledger: Ledger, *uris: str, evidence: Evidence = Evidence.CHANGED) -> None:
    ledger.wrote(uris, evidence, removes=False)


def update(ledger: Ledger, *uris: str, evidence: Evidence = Evidence.CHANGED) -> None:
    ledger.wrote(uris, evidence, removes=True)


def delete(ledger: Ledger, *uris: str, evidence: Evidence = Evidence.CHANGED) -> None:
    ledger.wrote(uris, evidence, removes=True, is_delete=True)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


class TestJudge:
    @pytest.mark.parametrize(
        ("facts", "expected"),
        [
            pytest.param(
                Facts(commit_sent=True, acknowledged=True, connections=1),
                Outcome.COMMITTED,
                id="COMMIT was acknowledged",
            ),
            pytest.param(Facts(connections=1), Outcome.ROLLED_BACK, id="COMMIT was never sent"),
            pytest.param(Facts(), Outcome.ROLLED_BACK, id="the database was never spoken to"),
            # a transaction in the failed state
            pytest.param(
                Facts(commit_sent=True, acknowledged=True, doubtful=True, connections=1),
                Outcome.UNKNOWN,
                id="COMMIT acknowledged after a failed statement without a probe",
            ),
            pytest.param(
                Facts(doubtful=True, connections=1),
                Outcome.ROLLED_BACK,
                id="the probe was refused, so COMMIT was not sent",
            ),
            # AUTOCOMMIT, legacy SQLite, DDL on MySQL, a text COMMIT
            pytest.param(Facts(autocommit=True), Outcome.UNKNOWN, id="AUTOCOMMIT, rolled back"),
            pytest.param(
                Facts(autocommit=True, commit_sent=True, acknowledged=True),
                Outcome.UNKNOWN,
                id="AUTOCOMMIT, committed",
            ),
            pytest.param(
                Facts(foreign_control=True), Outcome.UNKNOWN, id="a text COMMIT, rolled back"
            ),
            pytest.param(
                Facts(foreign_control=True, commit_sent=True, acknowledged=True),
                Outcome.UNKNOWN,
                id="a text COMMIT, committed",
            ),
            pytest.param(
                Facts(foreign_control=True, commit_sent=True, refused=True, answered=True),
                Outcome.UNKNOWN,
                id="a transaction that is not ours, COMMIT refused",
            ),
            # two-phase
            pytest.param(
                Facts(prepared=True, connections=1), Outcome.UNKNOWN, id="prepared, nothing more"
            ),
            pytest.param(
                Facts(prepared=True, commit_sent=True, connections=1),
                Outcome.UNKNOWN,
                id="prepared, second phase unanswered",
            ),
            pytest.param(
                Facts(prepared=True, commit_sent=True, refused=True, answered=True, connections=1),
                Outcome.UNKNOWN,
                id="prepared, second phase refused",
            ),
            pytest.param(
                Facts(prepared=True, commit_sent=True, acknowledged=True, connections=1),
                Outcome.COMMITTED,
                id="prepared, second phase acknowledged",
            ),
            # several connections in one session
            pytest.param(
                Facts(commit_sent=True, acknowledged=True, connections=2),
                Outcome.COMMITTED,
                id="two connections, both acknowledged",
            ),
            pytest.param(
                Facts(commit_sent=True, refused=True, answered=True, connections=2),
                Outcome.UNKNOWN,
                id="two connections, one may have committed before the other refused",
            ),
            # the reply to COMMIT was lost; neither a re-read nor pg_xact_status changes that
            pytest.param(
                Facts(commit_sent=True, connections=1), Outcome.UNKNOWN, id="reply to COMMIT lost"
            ),
            pytest.param(
                Facts(commit_sent=True, rollback_failed=True, connections=1),
                Outcome.UNKNOWN,
                id="reply to COMMIT lost, and ROLLBACK too",
            ),
            # the server refused
            pytest.param(
                Facts(commit_sent=True, refused=True, answered=True, connections=1),
                Outcome.ROLLED_BACK,
                id="COMMIT refused on an intact connection",
            ),
            pytest.param(
                Facts(commit_sent=True, answered=True, connections=1),
                Outcome.UNKNOWN,
                id="COMMIT answered with an error that says nothing",
            ),
            pytest.param(
                Facts(rollback_failed=True, connections=1),
                Outcome.ROLLED_BACK,
                id="ROLLBACK failed, but COMMIT was never sent",
            ),
            # SQLite keeps a refused transaction open
            pytest.param(
                Facts(is_sqlite=True, commit_sent=True, answered=True, still_open=False),
                Outcome.ROLLED_BACK,
                id="SQLite refused COMMIT, was rolled back and says so",
            ),
            pytest.param(
                Facts(is_sqlite=True, commit_sent=True, answered=True, still_open=True),
                Outcome.UNKNOWN,
                id="SQLite refused COMMIT and is still open",
            ),
            pytest.param(
                Facts(is_sqlite=True, commit_sent=True, answered=True),
                Outcome.UNKNOWN,
                id="SQLite refused COMMIT and was not asked",
            ),
            pytest.param(
                Facts(
                    is_sqlite=True,
                    commit_sent=True,
                    answered=True,
                    rollback_failed=True,
                    still_open=False,
                ),
                Outcome.UNKNOWN,
                id="SQLite refused COMMIT, ROLLBACK failed",
            ),
            pytest.param(
                Facts(is_sqlite=True, commit_sent=True, refused=True, still_open=None),
                Outcome.UNKNOWN,
                id="a SQLSTATE proves nothing on SQLite",
            ),
            pytest.param(
                Facts(is_sqlite=True, commit_sent=True, still_open=False),
                Outcome.UNKNOWN,
                id="SQLite's COMMIT was not answered",
            ),
            pytest.param(
                Facts(is_sqlite=True, rollback_failed=True),
                Outcome.UNKNOWN,
                id="SQLite's ROLLBACK failed: the next COMMIT could make it durable",
            ),
            pytest.param(
                Facts(is_sqlite=True, still_open=True),
                Outcome.UNKNOWN,
                id="SQLite is open after ROLLBACK",
            ),
            pytest.param(
                Facts(is_sqlite=True, still_open=False),
                Outcome.ROLLED_BACK,
                id="SQLite was rolled back",
            ),
        ],
    )
    def test_only_certainty_is_an_outcome(self, facts: Facts, expected: Outcome) -> None:
        """Each line of the table "What committed and rolled back are worth" has its verdict."""
        assert judge(facts) is expected

    @pytest.mark.parametrize(
        ("sqlstate", "expected"),
        [
            ("23505", True),  # unique_violation, deferred to COMMIT
            ("23503", True),
            ("40001", True),  # serialization_failure
            ("40P01", True),
            ("40003", False),  # statement_completion_unknown
            ("25P02", False),
            ("57P01", False),  # admin_shutdown
            ("08006", False),
            ("", False),
            (None, False),
        ],
    )
    def test_a_refusal_is_an_integrity_error_or_a_rollback(
        self, sqlstate: str | None, expected: bool
    ) -> None:
        """SQLSTATE 23xxx and 40xxx, but not 40003, mean that COMMIT certainly rolled back."""
        assert is_refusal(sqlstate) is expected


class TestOneReplace:
    @pytest.fixture
    def ledger(self) -> Ledger:
        ledger = Ledger()
        ledger.create(NEW, replaces=OLD)
        return ledger

    def test_commit_releases_the_old_object(self, ledger: Ledger) -> None:
        """A certain commit of a written URI deletes the object that it replaced."""
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == Settlement((), (OLD,), (), ())

    def test_rollback_deletes_the_new_object(self, ledger: Ledger) -> None:
        """A certain rollback deletes the new object and keeps the old one."""
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.ROLLED_BACK)

        assert ledger.settle() == Settlement((NEW,), (), (), ())

    def test_an_unknown_outcome_deletes_nothing(self, ledger: Ledger) -> None:
        """An unknown outcome deletes neither side and reports both."""
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.UNKNOWN)

        assert ledger.settle() == Settlement((), (), (NEW,), (OLD,))

    def test_unknown_stays_unknown(self, ledger: Ledger) -> None:
        """What is once in doubt stays so, though a later transaction writes it and commits."""
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.UNKNOWN)
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == Settlement((), (), (NEW,), (OLD,))

    def test_a_block_that_never_wrote_compensates(self, ledger: Ledger) -> None:
        """A block that ended without any transaction deletes what it uploaded."""
        assert ledger.settle() == Settlement((NEW,), (), (), ())

    def test_a_retry_after_a_rollback_counts(self, ledger: Ledger) -> None:
        """Several transactions in one block: the one that committed decides."""
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.ROLLED_BACK)
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == Settlement((), (OLD,), (), ())

    def test_a_commit_stands_whatever_comes_later(self, ledger: Ledger) -> None:
        """A rollback or an unknown outcome after a certain commit takes nothing back."""
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.COMMITTED)
        ledger.end_root(Outcome.ROLLED_BACK)
        ledger.end_root(Outcome.UNKNOWN)

        assert ledger.settle() == Settlement((), (OLD,), (), ())

    def test_a_rehomed_old_object_is_kept(self, ledger: Ledger) -> None:
        """An old URI that was put into another row is not deleted, come what may."""
        ledger.rehomed([OLD, NEW, "s3://b/p/unrelated"])
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == NOTHING_TO_DO

    def test_the_database_giving_up_forgets_the_work(self, ledger: Ledger) -> None:
        """A transaction that the database rolled back by itself has written nothing."""
        update(ledger, NEW, OLD)
        ledger.savepoint("a")
        ledger.database_gave_up()

        assert ledger.demand().unwritten == (NEW,)

    def test_both_sides_are_watched(self, ledger: Ledger) -> None:
        """Statements matter that name a new URI, the one that it replaces, or one to delete."""
        ledger.create(NEXT, replaces=None)
        ledger.delete("s3://b/p/gone")

        assert ledger.watched == {NEW, OLD, NEXT, "s3://b/p/gone"}


class TestDemand:
    def test_an_unwritten_upload_is_demanded(self, ledger: Ledger) -> None:
        """A new URI that no statement put into a row speaks against COMMIT."""
        ledger.create(NEW, replaces=None)
        ledger.create(NEXT, replaces=None)
        insert(ledger, NEXT)

        assert ledger.demand() == Demand((NEW,), ())

    @pytest.mark.parametrize("evidence", [Evidence.NOTHING, Evidence.UNCLEAR])
    def test_a_statement_without_proof_is_no_write(
        self, ledger: Ledger, evidence: Evidence
    ) -> None:
        """A statement that matched nothing, or may have, has written nothing."""
        ledger.create(NEW, replaces=OLD)
        update(ledger, NEW, OLD, evidence=evidence)

        assert ledger.demand().unwritten == (NEW,)

    def test_a_row_that_came_and_went_leaves_nothing(self, ledger: Ledger) -> None:
        """A new URI whose row was deleted again is in no row, and goes with the commit."""
        ledger.create(NEW, replaces=None)
        insert(ledger, NEW)
        delete(ledger, NEW)

        assert ledger.demand().unwritten == ()
        ledger.end_root(Outcome.COMMITTED)
        assert ledger.settle() == Settlement((NEW,), (), (), ())

    def test_a_delete_that_matched_nothing_takes_nothing_back(self, ledger: Ledger) -> None:
        """A DELETE that changed no row leaves a written URI written."""
        ledger.create(NEW, replaces=None)
        insert(ledger, NEW)
        delete(ledger, NEW, evidence=Evidence.NOTHING)

        assert ledger.demand().unwritten == ()

    def test_allow_unwritten_keeps_both_sides(self) -> None:
        """Taking the user's word for an unseen write leaves the new and the old object alone."""
        ledger = Ledger(keeps_unwritten=True)
        ledger.create(NEW, replaces=OLD)
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == NOTHING_TO_DO

    def test_what_was_mentioned_may_be_in_a_row(self, ledger: Ledger) -> None:
        """A URI that a committed statement mentioned is not deleted, proof or not."""
        ledger.create(NEW, replaces=OLD)
        ledger.mentioned([NEW])
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == NOTHING_TO_DO

    def test_an_unclear_write_is_kept_although_another_upload_was_to_replace_it(
        self, ledger: Ledger
    ) -> None:
        """An upload that may be in a row stays, also when one that is in none replaces it."""
        ledger.create(NEW, replaces=OLD)
        update(ledger, NEW, evidence=Evidence.UNCLEAR)
        ledger.create("s3://b/p/newer", replaces=NEW)
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == Settlement(("s3://b/p/newer",), (), (), ())

    def test_what_was_mentioned_and_rolled_back_is_in_no_row(self, ledger: Ledger) -> None:
        """Rolled back is rolled back, mentioned or not."""
        ledger.create(NEW, replaces=OLD)
        ledger.mentioned([NEW])
        ledger.end_root(Outcome.ROLLED_BACK)

        assert ledger.settle() == Settlement((NEW,), (), (), ())

    def test_what_was_given_up_is_not_demanded(self, ledger: Ledger) -> None:
        """A failed upload need not be written, and is deleted whichever way the block ends."""
        ledger.create(NEW, replaces=OLD)
        ledger.give_up(NEW)

        assert ledger.demand() == Demand((), ())
        ledger.end_root(Outcome.UNKNOWN)
        assert ledger.settle() == Settlement((NEW,), (), (), ())

    def test_what_was_forgotten_is_nobodys_business(self, ledger: Ledger) -> None:
        """An upload that was undone already leaves no trace."""
        ledger.create(NEW, replaces=OLD, savepoint="a")
        ledger.forget(NEW)
        ledger.savepoint_rolled_back("a")
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.demand() == Demand((), ())
        assert ledger.settle() == NOTHING_TO_DO
        assert not ledger.watched

    def test_uploads_are_demanded_anew_by_each_transaction(self, ledger: Ledger) -> None:
        """What a rolled-back transaction wrote is demanded again by the next one."""
        ledger.create(NEW, replaces=None)
        insert(ledger, NEW)
        ledger.end_root(Outcome.ROLLED_BACK)

        assert ledger.demand().unwritten == (NEW,)

    def test_committed_uploads_are_not_demanded_again(self, ledger: Ledger) -> None:
        """What is committed or in doubt already is no demand on the next transaction."""
        ledger.create(NEW, replaces=None)
        insert(ledger, NEW)
        ledger.end_root(Outcome.COMMITTED)
        ledger.create(NEXT, replaces=None)
        ledger.end_root(Outcome.UNKNOWN)

        assert ledger.demand() == Demand((), ())


class TestUnclearWrites:
    @pytest.fixture
    def ledger(self) -> Ledger:
        ledger = Ledger()
        ledger.create(NEW, replaces=OLD)
        return ledger

    def test_they_wait_for_confirmation(self, ledger: Ledger) -> None:
        """A row that was read back confirms what an unclear statement wrote."""
        update(ledger, NEW, OLD, evidence=Evidence.UNCLEAR)

        assert ledger.unclear() == [NEW]
        ledger.confirmed(NEW)
        assert ledger.unclear() == []
        assert ledger.demand() == Demand((), ())
        ledger.end_root(Outcome.COMMITTED)
        assert ledger.settle() == Settlement((), (OLD,), (), ())

    def test_a_clear_write_is_enough(self, ledger: Ledger) -> None:
        """A URI that was certainly written needs no confirmation."""
        update(ledger, NEW, OLD, evidence=Evidence.UNCLEAR)
        ledger.savepoint("a")
        update(ledger, NEW, OLD)

        assert ledger.unclear() == []

    def test_committed_unconfirmed_deletes_neither_side(self, ledger: Ledger) -> None:
        """A committed write without proof deletes nothing."""
        update(ledger, NEW, OLD, evidence=Evidence.UNCLEAR)
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == NOTHING_TO_DO

    def test_a_rollback_is_certain_all_the_same(self, ledger: Ledger) -> None:
        """A rolled-back unclear write is deleted like any other."""
        update(ledger, NEW, OLD, evidence=Evidence.UNCLEAR)
        ledger.end_root(Outcome.ROLLED_BACK)

        assert ledger.settle() == Settlement((NEW,), (), (), ())

    @pytest.mark.parametrize("outcome", [Outcome.COMMITTED, Outcome.UNKNOWN])
    def test_a_doomed_upload_may_have_been_written_again(
        self, ledger: Ledger, outcome: Outcome
    ) -> None:
        """An upload of a rolled-back savepoint that was perhaps written again is not deleted."""
        ledger = Ledger()
        ledger.create(NEW, replaces=OLD, savepoint="a")
        ledger.savepoint_rolled_back("a")
        update(ledger, NEW, OLD, evidence=Evidence.UNCLEAR)
        ledger.end_root(outcome)

        assert ledger.settle().compensate == ()


class TestSavepoints:
    def test_released_work_belongs_to_the_outer_frame(self, ledger: Ledger) -> None:
        """What a released savepoint wrote is written."""
        ledger.create(NEW, replaces=OLD)
        ledger.savepoint("a")
        update(ledger, NEW, OLD)
        ledger.release("a")
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == Settlement((), (OLD,), (), ())

    def test_a_savepoint_left_open_is_committed_with_the_root(self, ledger: Ledger) -> None:
        """COMMIT releases the savepoints that are open."""
        ledger.create(NEW, replaces=OLD)
        ledger.savepoint("a")
        ledger.savepoint("b")
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == Settlement((), (OLD,), (), ())

    def test_rolled_back_work_was_not_done(self, ledger: Ledger) -> None:
        """A URI written in a rolled-back savepoint was not written."""
        ledger.create(NEW, replaces=OLD)
        ledger.savepoint("a")
        update(ledger, NEW, OLD)
        ledger.rollback_to("a")

        assert ledger.demand().unwritten == (NEW,)

    def test_rolling_back_keeps_the_savepoint(self, ledger: Ledger) -> None:
        """A savepoint can be rolled back to again, and takes what came after it each time."""
        ledger.create(NEXT, replaces=None)
        insert(ledger, NEXT)
        ledger.create(NEW, replaces=OLD)
        ledger.savepoint("a")
        ledger.rollback_to("a")
        update(ledger, NEW, OLD)
        ledger.rollback_to("a")

        assert ledger.demand().unwritten == (NEW,)

    def test_written_again_after_the_rollback_is_written(self, ledger: Ledger) -> None:
        """A URI written again after its savepoint was rolled back is written."""
        ledger.create(NEW, replaces=OLD)
        ledger.savepoint("a")
        update(ledger, NEW, OLD)
        ledger.rollback_to("a")
        ledger.release("a")
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == Settlement((), (OLD,), (), ())

    def test_what_stood_before_stands(self, ledger: Ledger) -> None:
        """Rolling back a savepoint leaves alone what was written before it."""
        ledger.create(NEW, replaces=OLD)
        update(ledger, NEW, OLD)
        ledger.savepoint("a")
        delete(ledger, NEW)
        ledger.rollback_to("a")

        assert ledger.demand() == Demand((), ())

    def test_a_row_deleted_in_a_released_savepoint_is_gone(self, ledger: Ledger) -> None:
        """A DELETE in a released savepoint takes back what was written before it."""
        ledger.create(NEW, replaces=None)
        insert(ledger, NEW)
        ledger.savepoint("a")
        delete(ledger, NEW)
        ledger.release("a")
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == Settlement((NEW,), (), (), ())

    @pytest.mark.parametrize("outcome", list(Outcome))
    def test_an_upload_inside_is_doomed_with_it(self, ledger: Ledger, outcome: Outcome) -> None:
        """An upload made in a rolled-back savepoint goes, whichever way the root ends."""
        ledger.savepoint("a")
        ledger.create(NEW, replaces=OLD, savepoint="a")
        update(ledger, NEW, OLD)
        ledger.rollback_to("a")
        ledger.savepoint_rolled_back("a")

        assert ledger.demand() == Demand((), ())
        ledger.end_root(outcome)
        assert ledger.settle() == Settlement((NEW,), (), (), ())

    def test_nothing_is_doomed_where_savepoints_do_not_hold(self, ledger: Ledger) -> None:
        """On AUTOCOMMIT a rollback to a savepoint proves nothing, so nothing is deleted."""
        ledger.savepoint("a")
        ledger.create(NEW, replaces=OLD, savepoint="a")
        update(ledger, NEW, OLD)
        ledger.rollback_to("a")
        ledger.savepoint_rolled_back("a")
        ledger.end_root(Outcome.UNKNOWN, savepoints_held=False)

        assert ledger.settle() == Settlement((), (), (NEW,), (OLD,))

    @pytest.mark.parametrize("ends_with", ["release", "rollback"])
    def test_an_upload_inside_a_released_one_belongs_outside(
        self, ledger: Ledger, ends_with: str
    ) -> None:
        """An upload made in a released savepoint goes with the savepoint around it, if at all."""
        ledger.create(NEW, replaces=OLD, savepoint="inner")
        ledger.savepoint_released("inner", parent="outer")
        if ends_with == "release":
            ledger.savepoint_released("outer", parent=None)
        else:
            ledger.savepoint_rolled_back("outer")

        assert ledger.demand().unwritten == ((NEW,) if ends_with == "release" else ())

    def test_an_upload_rolled_back_and_written_again_stays(self, ledger: Ledger) -> None:
        """A doomed upload that a later statement put into a row after all is the row's."""
        ledger.create(NEW, replaces=OLD, savepoint="a")
        ledger.savepoint_rolled_back("a")
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == Settlement((), (OLD,), (), ())

    @pytest.mark.parametrize(
        ("steps", "written"),
        [
            (("release c", "release b", "release a"), True),
            (("release a",), True),
            (("rollback c",), False),
            (("release c", "rollback b"), False),
            (("release c", "release b", "rollback a"), False),
            (("rollback a",), False),
            (("rollback c", "write", "release b", "release a"), True),
            (("rollback b", "write", "rollback a"), False),
            (("rollback a", "write"), True),
            (("release unknown",), True),
            (("rollback unknown",), False),
        ],
    )
    def test_three_deep(self, ledger: Ledger, steps: tuple[str, ...], written: bool) -> None:
        """Savepoints nest: an outer release or rollback takes the inner ones with it."""
        ledger.create(NEW, replaces=None)
        for name in "abc":
            ledger.savepoint(name)
        insert(ledger, NEW)
        acts: dict[str, Callable[[str], None]] = {
            "release": ledger.release,
            "rollback": ledger.rollback_to,
            "write": lambda _: insert(ledger, NEW),
        }
        for step in steps:
            verb, _, name = step.partition(" ")
            acts[verb](name)

        assert (ledger.demand().unwritten == ()) is written

    def test_a_name_used_twice_means_the_inner_one(self, ledger: Ledger) -> None:
        """Of two savepoints with one name, the inner one is released and rolled back."""
        ledger.create(NEW, replaces=None)
        ledger.savepoint("a")
        insert(ledger, NEW)
        ledger.savepoint("a")
        ledger.rollback_to("a")

        assert ledger.demand().unwritten == ()
        ledger.release("a")
        ledger.rollback_to("a")
        assert ledger.demand().unwritten == (NEW,)


class TestChains:
    def test_both_written_releases_both_old_ones(self, ledger: Ledger) -> None:
        """Two replaces of one column in one block leave the last object only."""
        ledger.create(NEW, replaces=OLD)
        update(ledger, NEW, OLD)
        ledger.create(NEXT, replaces=NEW)
        update(ledger, NEXT, NEW)

        assert ledger.demand() == Demand((), ())
        ledger.end_root(Outcome.COMMITTED)
        assert ledger.settle() == Settlement((), (OLD, NEW), (), ())

    def test_one_never_written_is_passed_over(self, ledger: Ledger) -> None:
        """If only the last of two replaces went into the row, the first and the old one go."""
        ledger.create(NEW, replaces=OLD)
        ledger.create(NEXT, replaces=NEW)
        update(ledger, NEXT)
        ledger.end_root(Outcome.COMMITTED)
        settlement = ledger.settle()

        assert {*settlement.compensate, *settlement.supersede} == {NEW, OLD}

    def test_the_last_one_undone_leaves_the_first(self, ledger: Ledger) -> None:
        """If the second replace was rolled back with its savepoint, the first one stands."""
        ledger.create(NEW, replaces=OLD)
        update(ledger, NEW, OLD)
        ledger.savepoint("a")
        ledger.create(NEXT, replaces=NEW, savepoint="a")
        update(ledger, NEXT, NEW)
        ledger.rollback_to("a")
        ledger.savepoint_rolled_back("a")
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == Settlement((NEXT,), (OLD,), (), ())

    def test_written_back_later_stays(self, ledger: Ledger) -> None:
        """A URI that was written again after its successor is the row's, and stays."""
        ledger.create(NEW, replaces=OLD)
        ledger.create(NEXT, replaces=NEW)
        update(ledger, NEXT)
        update(ledger, NEW)
        ledger.end_root(Outcome.COMMITTED)

        assert NEW not in ledger.settle().supersede

    def test_each_transaction_has_its_own_outcome(self, ledger: Ledger) -> None:
        """A replace in doubt leaves what a certain commit before it had put into the row."""
        ledger.create(NEW, replaces=OLD)
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.COMMITTED)
        ledger.create(NEXT, replaces=NEW)
        update(ledger, NEXT, NEW)
        ledger.end_root(Outcome.UNKNOWN)

        assert ledger.settle() == Settlement((), (OLD,), (NEXT,), (NEW,))

    def test_a_chain_stops_at_doubt(self, ledger: Ledger) -> None:
        """Nothing behind an object in doubt is deleted."""
        ledger.create(NEW, replaces=OLD)
        update(ledger, NEW, OLD)
        ledger.end_root(Outcome.UNKNOWN)
        ledger.create(NEXT, replaces=NEW)
        update(ledger, NEXT, NEW)
        ledger.end_root(Outcome.COMMITTED)

        assert ledger.settle() == Settlement((), (), (NEW,), (OLD,))


class TestDeletes:
    @pytest.fixture
    def ledger(self) -> Ledger:
        ledger = Ledger()
        ledger.delete(OLD)
        return ledger

    def test_a_delete_that_names_it_releases(self, ledger: Ledger) -> None:
        """A guarded DELETE that matched releases the object at the commit."""
        delete(ledger, OLD)

        assert ledger.demand() == Demand((), ())
        ledger.end_root(Outcome.COMMITTED)
        assert ledger.settle() == Settlement((), (OLD,), (), ())

    def test_a_delete_that_does_not_name_it_proves_nothing(self, ledger: Ledger) -> None:
        """A DELETE that does not name the URI may be another row's."""
        delete(ledger)

        assert ledger.demand() == Demand((), (OLD,))

    def test_a_row_that_was_read_again_proves_it(self, ledger: Ledger) -> None:
        """A row that was read and does not name the object any more releases it."""
        delete(ledger)
        ledger.confirmed_gone(OLD)

        assert ledger.demand() == Demand((), ())
        ledger.end_root(Outcome.COMMITTED)
        assert ledger.settle() == Settlement((), (OLD,), (), ())

    def test_a_guard_that_matched_nothing_is_refused(self, ledger: Ledger) -> None:
        """A guarded DELETE that matched nothing speaks against COMMIT, whatever else changed."""
        delete(ledger, OLD, evidence=Evidence.NOTHING)
        update(ledger)

        assert ledger.demand() == Demand((), (OLD,))

    def test_a_second_attempt_is_enough(self, ledger: Ledger) -> None:
        """A DELETE that matches after one that did not releases the object."""
        delete(ledger, OLD, evidence=Evidence.NOTHING)
        delete(ledger, OLD)

        assert ledger.demand() == Demand((), ())

    def test_a_guard_is_never_replaced_by_other_changes(self, ledger: Ledger) -> None:
        """Once a statement named the object, another row's change proves nothing about it."""
        delete(ledger, OLD)
        ledger.end_root(Outcome.ROLLED_BACK)
        update(ledger)

        assert ledger.demand() == Demand((), (OLD,))
        ledger.end_root(Outcome.COMMITTED)
        assert ledger.settle() == NOTHING_TO_DO

    @pytest.mark.parametrize("evidence", [None, Evidence.NOTHING])
    def test_no_changed_row_is_refused(self, ledger: Ledger, evidence: Evidence | None) -> None:
        """An object whose row nobody deleted speaks against COMMIT."""
        if evidence is not None:
            delete(ledger, evidence=evidence)

        assert ledger.demand() == Demand((), (OLD,))

    def test_an_insert_removes_nothing(self, ledger: Ledger) -> None:
        """An INSERT is no evidence that a row is gone."""
        insert(ledger, OLD)

        assert ledger.demand() == Demand((), (OLD,))

    def test_a_rolled_back_delete_was_not_done(self, ledger: Ledger) -> None:
        """A DELETE in a rolled-back savepoint releases nothing."""
        ledger.savepoint("a")
        delete(ledger, OLD)
        ledger.rollback_to("a")

        assert ledger.demand() == Demand((), (OLD,))
        ledger.end_root(Outcome.COMMITTED)
        assert ledger.settle() == NOTHING_TO_DO

    @pytest.mark.parametrize(
        ("outcome", "undecided"), [(Outcome.ROLLED_BACK, ()), (Outcome.UNKNOWN, (OLD,))]
    )
    def test_only_a_commit_deletes(
        self, ledger: Ledger, outcome: Outcome, undecided: tuple[str, ...]
    ) -> None:
        """Without a certain commit the row's object stays."""
        delete(ledger, OLD)
        ledger.end_root(outcome)

        assert ledger.settle() == Settlement((), (), (), undecided)

    def test_a_new_object_whose_row_is_deleted_goes(self, ledger: Ledger) -> None:
        """A row that was written and deleted in one block leaves no object."""
        ledger.create(NEW, replaces=None)
        insert(ledger, NEW)
        ledger.delete(NEW)
        delete(ledger, NEW)
        delete(ledger, OLD)

        assert ledger.demand() == Demand((), ())
        ledger.end_root(Outcome.COMMITTED)
        assert set(ledger.settle().supersede) == {OLD, NEW}

    @pytest.mark.parametrize("evidence", [Evidence.CHANGED, Evidence.UNCLEAR])
    def test_written_again_after_its_delete_was_undone(
        self, ledger: Ledger, evidence: Evidence
    ) -> None:
        """A row whose delete was rolled back, and that was written again, keeps its object."""
        ledger.create(NEW, replaces=None)
        insert(ledger, NEW)
        ledger.savepoint("a")
        ledger.delete(NEW)
        delete(ledger, NEW)
        ledger.rollback_to("a")
        update(ledger, NEW, evidence=evidence)
        ledger.end_root(Outcome.COMMITTED)

        assert NEW not in ledger.settle().supersede
        assert NEW not in ledger.settle().compensate

    def test_a_new_row_deleted_by_primary_key_leaves_nothing(self, ledger: Ledger) -> None:
        """A row that was written, then deleted without naming its object, leaves none."""
        ledger.create(NEW, replaces=None)
        insert(ledger, NEW)
        ledger.delete(NEW)
        delete(ledger)
        ledger.confirmed_gone(NEW)
        ledger.confirmed_gone(OLD)
        ledger.end_root(Outcome.COMMITTED)

        assert set(ledger.settle().supersede) == {OLD, NEW}

    @pytest.mark.parametrize(
        ("evidence", "expected"), [(Evidence.CHANGED, {NEW, OLD}), (Evidence.UNCLEAR, {NEW})]
    )
    def test_a_row_that_was_replaced_and_deleted_leaves_nothing(
        self, evidence: Evidence, expected: set[str]
    ) -> None:
        """Deleting a row that was updated in the same block deletes what the update replaced."""
        ledger = Ledger()
        ledger.create(NEW, replaces=OLD)
        update(ledger, NEW, OLD)
        ledger.delete(NEW)
        delete(ledger, NEW, evidence=evidence)
        ledger.end_root(Outcome.COMMITTED)

        assert set(ledger.settle().supersede) == expected


class LedgerMachine(RuleBasedStateMachine):
    """A naive database beside the ledger: a dict of rows, copies of it for savepoints."""

    rows = Bundle("rows")
    uploads = Bundle("uploads")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.count = 0
        self.replaces: dict[str, tuple[str, str | None]] = {}
        self.deletes: set[str] = set()
        self.past: list[str] = []  # every URI that a row was born with
        # name, rows, and the number of the session's savepoint (None once it was rolled back)
        self.savepoints: list[tuple[str, dict[str, str | None], int | None]] = []
        self.committed: dict[str, str | None] = {}
        self.now: dict[str, str | None] = {}
        self.possible: list[dict[str, str | None]] = []  # states that may be the durable one
        self.is_unclear = False

    @initialize(target=rows, number=st.integers(1, 4))
    def start(self, number: int) -> object:
        for each in range(number):
            uri = None if each == 0 else f"s3://b/p/old{each}"
            self.committed[f"row{each}"] = uri
            if uri is not None:
                self.past.append(uri)
        self.now = dict(self.committed)
        self.possible = [self.committed]
        return multiple(*self.committed)

    @rule(target=uploads, row=rows)
    def upload(self, row: str) -> str:
        self.count += 1
        uri = f"s3://b/p/new{self.count}"
        old = self.now.get(row)
        self.replaces[uri] = (row, old)
        self.ledger.create(uri, replaces=old, savepoint=self._innermost(self.savepoints))
        return uri

    @staticmethod
    def _innermost(savepoints: list[tuple[str, dict[str, str | None], int | None]]) -> int | None:
        return next((number for *_, number in reversed(savepoints) if number is not None), None)

    @rule(uri=uploads, is_guarded=st.booleans())
    def write(self, uri: str, is_guarded: bool) -> None:
        row, old = self.replaces[uri]
        # an unguarded write is the user's word that the row still holds what it replaces
        may_hold = {old} if is_guarded else {old, uri}
        matches = row in self.now and self.now[row] in may_hold
        if not matches and not is_guarded:
            return
        named = {uri} | ({old} if old and is_guarded else set())
        if matches:
            self.now[row] = uri
        update(self.ledger, *named, evidence=Evidence.CHANGED if matches else Evidence.NOTHING)

    @rule(uri=uploads, is_written=st.booleans())
    def write_unclearly(self, uri: str, is_written: bool) -> None:
        row, old = self.replaces[uri]
        if row in self.now and self.now[row] in {old, uri}:
            if is_written:
                self.now[row] = uri
            self.is_unclear = True
            update(self.ledger, uri, evidence=Evidence.UNCLEAR)

    @rule(row=rows)
    def delete_row(self, row: str) -> None:
        uri = self.now.get(row)
        if uri is None:
            return
        self.ledger.delete(uri)
        self.deletes.add(uri)
        del self.now[row]
        delete(self.ledger, uri)

    @rule(row=rows)
    def delete_with_a_stale_guard(self, row: str) -> None:
        stale = "s3://b/p/stale"
        self.ledger.delete(stale)
        delete(self.ledger, stale, evidence=Evidence.NOTHING)

    @rule(target=uploads, uri=consumes(uploads))
    def confirm(self, uri: str) -> str:
        row, _ = self.replaces[uri]
        if uri in self.ledger.unclear() and self.now.get(row) == uri:
            self.ledger.confirmed(uri)
        return uri

    @rule(name=st.sampled_from("ab"))
    def savepoint(self, name: str) -> None:
        self.count += 1
        self.savepoints.append((name, copy.copy(self.now), self.count))
        self.ledger.savepoint(name)

    def _depth(self, name: str) -> int | None:
        depths = [at for at, (each, *_) in enumerate(self.savepoints) if each == name]
        return depths[-1] if depths else None

    @precondition(lambda self: self.savepoints)
    @rule(name=st.sampled_from("ab"))
    def release(self, name: str) -> None:
        depth = self._depth(name)
        if depth is not None:
            while len(self.savepoints) > depth:
                *_, number = self.savepoints.pop()
                if number is not None:
                    parent = self._innermost(self.savepoints)
                    self.ledger.savepoint_released(number, parent=parent)
            self.ledger.release(name)

    @precondition(lambda self: self.savepoints)
    @rule(name=st.sampled_from("ab"))
    def rollback_to(self, name: str) -> None:
        depth = self._depth(name)
        if depth is not None:
            rows = self.savepoints[depth][1]
            for *_, number in reversed(self.savepoints[depth:]):
                if number is not None:
                    self.ledger.savepoint_rolled_back(number)
            self.savepoints[depth:] = [(name, rows, None)]
            self.now = copy.copy(rows)
            self.ledger.rollback_to(name)

    def _end(self, outcome: Outcome) -> None:
        if outcome is Outcome.COMMITTED:
            self.committed, self.possible = self.now, [self.now]
        elif outcome is Outcome.ROLLED_BACK:
            self.now = self.committed
        else:
            self.possible = [*self.possible, self.now]
            self.is_unclear = True
        self.now = dict(self.now)
        self.savepoints.clear()
        self.ledger.end_root(outcome)

    @rule()
    def commit(self) -> None:
        self._end(Outcome.COMMITTED)

    @rule()
    def rollback(self) -> None:
        self._end(Outcome.ROLLED_BACK)

    @precondition(lambda self: len(self.possible) == 1)
    @rule(really_committed=st.booleans())
    def lose_the_answer(self, really_committed: bool) -> None:
        before, after = self.committed, dict(self.now)
        self._end(Outcome.UNKNOWN)
        self.possible = [before, after]
        self.committed = after if really_committed else before
        self.now = dict(self.committed)

    def teardown(self) -> None:
        self.ledger.end_root(Outcome.ROLLED_BACK)
        settlement = self.ledger.settle()
        deleted = {*settlement.compensate, *settlement.supersede}
        named = {uri for uri in self.committed.values() if uri is not None}

        assert not deleted & named, "LOSS: a committed row names a deleted object"
        assert len(deleted) == len(settlement.compensate) + len(settlement.supersede)
        if not self.is_unclear:
            gone = ({*self.replaces, *self.past} - named) - deleted
            assert not gone, f"LEAK: certain, and left undeleted: {gone}"


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=400, stateful_step_count=30, deadline=None)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_as_many_programs_as_take_minutes() -> None:
    """No program of 20,000 makes the ledger delete what a row names, or forget what none does."""
    many = settings(max_examples=20_000, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(LedgerMachine, settings=many)
