"""Uploads that are written down first: one act of a session, or of a `put_s3` without one.

Invariants: nothing is sent to a store before its entry is staged; without a journal this is
`upload_each` and nothing else.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from .._store._base import DeleteReport
from .._tasks import run_to_end
from .._transfer import compensate, upload_each
from ._writer import SETTLE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

    from .._transfer import Attempt, Upload
    from ._writer import JournalWriter


class Staging:
    """One act: `begin` it, in a greenlet if there is a session, then `upload`.

    Attributes:
        is_begun: the journal may list the objects, whatever happened since.
    """

    def __init__(self, writer: JournalWriter | None) -> None:
        self.is_begun = False
        self._writer = writer
        self._is_inside = False

    def begin(self, session: Session | None, uris: Sequence[str]) -> None:
        """Refuse what no row could adopt; stage what has to go through the session.

        Raises:
            InvalidInputError: in none of the journal's stores.
            UnsafeTransactionError: the transaction could not see what is staged from now on.
        """
        writer = self._writer
        if writer is None or not uris:
            return
        writer.check_uris(uris)
        if session is None:
            return
        writer.check_snapshot(session)
        if writer.stages_inside(session):
            self.is_begun = self._is_inside = True
            writer.stage_inside(session, uris)

    async def upload(self, uploads: Sequence[Upload]) -> list[Attempt]:
        """Stage, if that was not done yet, and upload; see `upload_each`.

        Raises:
            JournalError: the journal could not be written; nothing was sent.
        """
        writer = self._writer
        if writer is None or not uploads:
            return await upload_each(uploads)
        if self._is_inside:  # nobody else sees it yet, and nobody else may write
            return await upload_each(uploads)
        uris = [upload.uri for upload in uploads]
        for upload in uploads:
            upload.note_upload = functools.partial(writer.note_upload, upload.uri)
        self.is_begun = True
        await writer.stage(uris)
        async with writer.renewing(uris):
            return await upload_each(uploads)


async def undo(attempts: Sequence[Attempt], writer: JournalWriter | None) -> DeleteReport:
    """Delete what *attempts* may have stored, through the journal if there is one.

    Also while the caller is cancelled; storage trouble is reported. See `compensate`.

    Raises:
        asyncio.CancelledError: after the deletes were carried out.
    """
    if writer is None:
        return await compensate(attempts)
    unneeded = {attempt.uri: attempt.store for attempt in attempts}
    late = [attempt.uri for attempt in attempts if attempt.may_land_late]
    seconds = max((store.request_seconds for store in unneeded.values()), default=60.0)
    settling = writer.settle(unneeded, unanswered=late)
    return await run_to_end(settling, seconds=SETTLE_SECONDS + 2 * seconds)
