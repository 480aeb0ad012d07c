"""The processes of one launch: how they talk, and which of them does what."""

import datetime
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from annotate_data.generated import characters
from common.cli import UserError
from common.training import world_size


def leave(action: Callable) -> None:
    """`action()`, then the end of this process; among several at once, without taking torch apart.

    Threads of gloo and torch that are still there then turn about one end in forty into an abort.
    """
    status = 0
    try:
        action()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    if world_size() > 1:
        os._exit(status)
    sys.exit(status)


class World:
    """The processes of one launch. They talk through gloo, which waits as long as the slowest needs."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", "0")), world_size()
        if self.size > 1:
            self._end_on_signals()
            import torch.distributed

            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))

    def _end_on_signals(self):
        """Let a thread answer Ctrl-C and the launcher's SIGTERM: the main one is deaf in a collective.

        What was saved is on disk, so the process ends at once. Call before other threads are started.
        """
        ends = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)

        def wait():
            number = signal.sigwait(ends)
            if self.rank == 0 and number == signal.SIGINT:  # SIGTERM follows an error that was printed
                print("stopped; start the same command again to continue", file=sys.stderr, flush=True)
            os._exit(128 + number)

        threading.Thread(target=wait, daemon=True).start()

    def gather(self, value: object = None) -> list:
        """The values of all ranks, on every rank; also a barrier."""
        if self.size == 1:
            return [value]
        import torch.distributed

        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def together(self, action: Callable) -> Any:
        """`action()` on every rank; one rank's UserError is raised on all, for rank 0 alone tells errors."""
        value = error = None
        try:
            value = action()
        except UserError as raised:
            error = str(raised)
        errors = [e for e in self.gather(error) if e]
        if errors:
            raise UserError(errors[0])
        return value


def share(chunk: list[tuple[int, dict]], rank: int, world: int) -> list[tuple[int, dict]]:
    """What `rank` of `world` works on of a chunk of (number, record): about equal work and numbers, whatever
    the chunk's order.
    """
    ordered = sorted(chunk, key=lambda item: (-characters(item[1]), item[0]))
    turns = [*range(world), *reversed(range(world))]  # dealt there and back: nobody always gets the longer
    return [item for i, item in enumerate(ordered) if turns[i % len(turns)] == rank]
