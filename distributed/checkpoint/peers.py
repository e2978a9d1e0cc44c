"""The ranks that save a checkpoint together, over a gloo group of their own; a world of one needs no group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ...recipes.errors import FtlaunchError, InfrastructureError, Superseded, UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


class LostRank(InfrastructureError):
    """Another rank died, or did not answer in time. The group is broken from then on, for all that it connects."""


class Transfer(Protocol):
    """A send or receive that is under way."""

    def wait(self) -> Any:
        """Block until the buffer may be used again."""
        ...


@dataclass(frozen=True)
class Peers:
    """`rank` of `size` within `group`, which must be able to move host memory (gloo)."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with _lost_rank():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.gather(value if self.rank == 0 else None)[0]

    def send(self, data: torch.Tensor, to: int) -> Transfer:
        """Begin to send host memory; it must stay as it is until the transfer was waited for."""
        import torch.distributed as dist

        with _lost_rank():
            return _started(dist.isend(data, group=self.group, group_dst=to))

    def receive(self, data: torch.Tensor, source: int) -> Transfer:
        """Begin to receive into host memory."""
        import torch.distributed as dist

        with _lost_rank():
            return _started(dist.irecv(data, group=self.group, group_src=source))

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """What one rank fails at, all ranks fail at: the block's exception is told to all, and every rank raises. That
        the attempt is superseded counts more than whatever else failed.

        The block must take part in every transfer that the others expect of it, whatever happens to it.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self._agree(error, doing)

    def _agree(self, error: Exception | None, doing: str) -> None:
        told = None if error is None else (_kind(error), str(error) or repr(error))
        try:
            everyone = self.gather(told)
        except InfrastructureError:
            if error is not None:
                raise error from None
            raise
        failures = [(rank, *failure) for rank, failure in enumerate(everyone) if failure is not None]
        for _, kind, message in failures:
            if kind is Superseded:
                raise Superseded(message) from error
        if error is not None:
            raise error
        if failures:
            rank, kind, message = failures[0]
            raise kind(f"rank {rank} failed {doing}: {message}")


def _kind(error: Exception) -> type[FtlaunchError]:
    """As what the other ranks raise it."""
    kinds: tuple[type[FtlaunchError], ...] = (Superseded, UserError)
    return next((kind for kind in kinds if isinstance(error, kind)), InfrastructureError)


@dataclass(frozen=True)
class _Guarded:
    transfer: Transfer

    def wait(self) -> None:
        with _lost_rank():
            self.transfer.wait()


def _started(transfer: Transfer | None) -> Transfer:
    if transfer is None:
        raise ValueError("this rank is not in the group it saves with")
    return _Guarded(transfer)


@contextmanager
def _lost_rank() -> Iterator[None]:
    """torch reports a dead peer, a closed connection and a time-out alike, as RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise LostRank(f"the connection to another rank broke during a save: {error}") from error
