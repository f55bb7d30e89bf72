"""The scenarios: each is a program that somebody may write, on a day that somebody may have.

What a program raises or what its storage refuses is let through; `compare.py` notes it. A
scenario asserts nothing: the verdict is what both stores hold when the program has ended.
"""

from __future__ import annotations

import asyncio
import contextlib

from bench import Abort, Lab, thumb_of
from sqlalchemy import delete


async def no_fault(lab: Lab) -> None:
    """Nothing goes wrong: three rows, of which one is replaced and one deleted."""
    kept, replaced, deleted = [await lab.seed(each) for each in ("kept", "old", "gone")]
    async with lab.session() as session, session.begin():
        lab.rewrite(await session.get_one(lab.Doc, replaced), "new")
        await session.delete(await session.get_one(lab.Doc, deleted))
        await session.get_one(lab.Doc, kept)


async def storage_down(lab: Lab) -> None:
    """The storage is down while a row is created."""
    lab.faults.refuse("put")
    async with lab.session() as session, session.begin():
        session.add(lab.doc("a"))


async def second_upload_refused(lab: Lab) -> None:
    """The storage takes the first of a row's two files and refuses the second."""
    lab.faults.refuse("put", after=1)
    async with lab.session() as session, session.begin():
        session.add(lab.doc("a", thumb=lab.file(thumb_of("a").encode())))


async def program_raises(lab: Lab) -> None:
    """The program raises after a flush, and the transaction is rolled back."""
    async with lab.session() as session, session.begin():
        session.add(lab.doc("a"))
        await session.flush()
        raise Abort


async def closed_without_commit(lab: Lab) -> None:
    """The program raises after a flush, and the session is only closed."""
    async with lab.session() as session:
        session.add(lab.doc("a"))
        await session.flush()
        raise Abort


async def integrity_error(lab: Lab) -> None:
    """The primary key is taken: the database refuses the INSERT."""
    taken = await lab.seed("first")
    async with lab.session() as session:
        session.add(lab.doc("second", id=taken))
        await session.commit()


async def savepoint_rolled_back(lab: Lab) -> None:
    """A savepoint is rolled back, and the transaction around it commits."""
    async with lab.session() as session, session.begin():
        session.add(lab.doc("outer"))
        await session.flush()
        with contextlib.suppress(Abort):
            async with session.begin_nested():
                session.add(lab.doc("inner"))
                await session.flush()
                raise Abort


async def savepoint_released(lab: Lab) -> None:
    """A file is replaced in a savepoint that is released; the transaction is rolled back."""
    replaced = await lab.seed("old")
    async with lab.session() as session, session.begin():
        async with session.begin_nested():
            lab.rewrite(await session.get_one(lab.Doc, replaced), "new")
        raise Abort


async def reply_lost(lab: Lab) -> None:
    """COMMIT of a new row is carried out, and its reply is lost."""
    with lab.lost_reply():
        async with lab.session() as session, session.begin():
            session.add(lab.doc("a"))


async def commit_of_a_delete_refused(lab: Lab) -> None:
    """A row is deleted, and the database refuses COMMIT."""
    kept = await lab.seed("a")
    with lab.refused_commit():
        async with lab.session() as session, session.begin():
            await session.delete(await session.get_one(lab.Doc, kept))


async def old_object_stays(lab: Lab) -> None:
    """A file is replaced, and the storage refuses to delete the old one."""
    replaced = await lab.seed("old")
    lab.faults.refuse("delete")
    async with lab.session() as session, session.begin():
        lab.rewrite(await session.get_one(lab.Doc, replaced), "new")


async def second_writer(lab: Lab) -> None:
    """Two requests read a row, then each replaces its file, one after the other."""
    replaced = await lab.seed("old")
    async with lab.session() as one, lab.session() as other:
        read_by_one = await one.get_one(lab.Doc, replaced)
        await one.commit()
        read_by_other = await other.get_one(lab.Doc, replaced)
        await other.commit()

        lab.rewrite(read_by_one, "one")
        await one.commit()
        lab.rewrite(read_by_other, "other")
        await other.commit()


async def replaced_unread(lab: Lab) -> None:
    """A file is replaced on an object whose attributes are expired."""
    replaced = await lab.seed("old")
    async with lab.session() as session, session.begin():
        doc = await session.get_one(lab.Doc, replaced)
        session.expire(doc)
        lab.rewrite(doc, "new")


async def tried_again(lab: Lab) -> None:
    """The transaction is rolled back, and the same object is added and committed again."""
    async with lab.session() as session:
        session.add(doc := lab.doc("a"))
        await session.flush()
        await session.rollback()
        session.add(doc)
        await session.commit()


async def two_transactions(lab: Lab) -> None:
    """A session commits, then has a second transaction of 100 ms; a PUT takes 20 ms."""
    lab.faults.slow("put", seconds=0.02)
    async with lab.session() as session:
        session.add(lab.doc("first"))
        await session.commit()
        session.add(lab.doc("second"))
        await session.flush()
        await asyncio.sleep(0.1)  # what the program does meanwhile
        await session.commit()


async def cancelled_upload(lab: Lab) -> None:
    """The request is cancelled while its PUT is on the wire."""
    gate = lab.faults.hold("put")
    request = asyncio.create_task(_create(lab))
    reached = asyncio.create_task(gate.reached.wait())
    await asyncio.wait({request, reached}, return_when=asyncio.FIRST_COMPLETED)
    request.cancel()
    gate.open()
    await asyncio.wait({request})
    reached.cancel()


async def cancelled_commit(lab: Lab) -> None:
    """The request is cancelled while its COMMIT is on the wire."""
    with lab.cancelled_commit(lambda: request):
        request = asyncio.create_task(_create(lab))
        await asyncio.wait({request})


async def program_ends(lab: Lab) -> None:
    """The program ends when its commit has returned, and a PUT takes 200 ms."""
    lab.faults.slow("put", seconds=0.2)
    await _create(lab)


async def bulk_delete(lab: Lab) -> None:
    """A row is deleted by an ORM `delete()` statement."""
    await lab.seed("a")
    async with lab.session() as session, session.begin():
        await session.execute(delete(lab.Doc).where(lab.Doc.says == "a"))


async def orphan_deleted(lab: Lab) -> None:
    """A child is taken out of a `delete-orphan` collection."""
    async with lab.session() as session, session.begin():
        session.add(folder := lab.Folder(docs=[lab.doc("a")]))
    await lab.settle()
    async with lab.session() as session, session.begin():
        loaded = await session.get_one(lab.Folder, folder.id)
        loaded.docs.clear()


async def same_file_name(lab: Lab) -> None:
    """Two users upload their `avatar.png`."""
    for says in ("alice", "bob"):
        async with lab.session() as session, session.begin():
            session.add(lab.doc(says, name="avatar.png"))
        await lab.settle()


async def _create(lab: Lab) -> None:
    async with lab.session() as session, session.begin():
        session.add(lab.doc("a"))


SCENARIOS = (
    no_fault,
    storage_down,
    second_upload_refused,
    program_raises,
    closed_without_commit,
    integrity_error,
    savepoint_rolled_back,
    savepoint_released,
    reply_lost,
    commit_of_a_delete_refused,
    old_object_stays,
    second_writer,
    replaced_unread,
    tried_again,
    two_transactions,
    cancelled_upload,
    cancelled_commit,
    program_ends,
    bulk_delete,
    orphan_deleted,
    same_file_name,
)
