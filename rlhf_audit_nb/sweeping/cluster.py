"""Workers of a Dask cluster, for ``--cluster``. Floor 5.

The same tasks as on this machine, carried out one at a time by each worker. `distributed` is imported here only, when
a cluster is asked for.

A trail in a folder is an SQLite file with a write-ahead log, which processes of one machine can share and no others;
so every worker is probed before it gets anything to do: it must run the same version under the same kernel of the
operating system, read what we wrote beside the trail and in the output folder, and open the trail to append. A worker
that joins later is probed as well. Where one cannot take part, the sweep is refused before it begins.
"""

from __future__ import annotations

import queue
import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import AuditError, ConfigError
from rlhf_audit_nb.sweeping.task import ATTEMPTS, Task, run_task, stop_file

if TYPE_CHECKING:
    from rlhf_audit_nb.sweeping.pool import Finished

__all__ = ["ClusterPool", "Probe", "probe"]

CONNECT_SECONDS = 20
_LOST_SECONDS = 60.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def machine() -> str:
    """What tells one running operating system from another."""
    return _BOOT.read_text(encoding="ascii").strip() if _BOOT.exists() else socket.gethostname()


class Probe:
    """What a worker is asked, before it gets anything to do; goes there by value."""

    def __init__(self, folder: Path, trail: Path, home: str | None) -> None:
        from rlhf_audit_nb import __version__

        self.folder, self.trail, self.home = str(folder), str(trail), home
        self.version, self.machine, self.nonce = __version__, machine(), secrets.token_hex(16)

    @property
    def places(self) -> tuple[Path, Path]:
        """Where the nonce is written, and read by the worker."""
        return Path(self.folder) / ATTEMPTS / "probe", Path(self.trail) / "artifacts" / f"probe-{self.nonce[:8]}"

    def write(self) -> None:
        """Leave the nonce in both folders."""
        for place in self.places:
            place.write_text(self.nonce, encoding="ascii")

    def clear(self) -> None:
        """Take it away again."""
        for place in self.places:
            place.unlink(missing_ok=True)


def probe(asked: Probe) -> str:
    """Runs on a worker: why it cannot take part, as the rest of a sentence; empty where it can."""
    from rlhf_audit_nb import __version__
    from rlhf_audit_nb.trail import Trail

    if __version__ != asked.version:
        return f"it has version {__version__} of this package, and {asked.version} is here"
    if machine() != asked.machine:
        return "it runs on another machine, and a trail in a folder can be written by processes of one machine only"
    for place, what in zip(asked.places, ("output folder", "trail's folder"), strict=True):
        try:
            found = place.read_text(encoding="ascii")
        except OSError as error:
            return f"it cannot read the {what} ({error.strerror or error})"
        if found != asked.nonce:
            return f"its {what} is another one than ours"
    try:
        written = Path(asked.folder) / ATTEMPTS / f"probe-{secrets.token_hex(8)}"
        written.write_text(asked.nonce, encoding="ascii")
        written.unlink()
        # Opening appends within a transaction what was left open, if anything: the lock, the keys and the disk.
        Trail.open(asked.trail, create=False, home=None if asked.home is None else Path(asked.home)).close()
    except (AuditError, OSError) as error:
        return f"it cannot write to the trail or the output folder ({error})"
    return ""


def _untyped(value: Any) -> Any:
    """What the library gives without types."""
    return value


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(
        f"--cluster needs Dask's distributed, which is not installed here ({error}).",
        next_step='Install it: pip install "rlhf-audit-trail[cluster]". Without --cluster, this machine runs them.',
        code="no-cluster",
    )


class ClusterPool:
    """The workers of the scheduler at ``address`` (such as ``tcp://127.0.0.1:8786``), one task each.

    Raises:
        ConfigError: code ``no-cluster``: the extra is not installed, no scheduler answers, or it has no worker;
            code ``cluster-worker``: a worker cannot take part.
    """

    where = "cluster"

    def __init__(self, address: str, asked: Probe, most: int | None = None) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise _missing(error) from error
        try:
            self._client: Any = _untyped(Client)(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise ConfigError(
                f"No Dask scheduler answers at {address}: {error}.",
                next_step="Name the address that the scheduler prints when it starts, such as tcp://HOST:8786.",
                code="no-cluster",
            ) from error
        self._asked = asked
        self._most = most
        self._probed: dict[str, str] = {}
        self._running: dict[str, tuple[Task, Any]] = {}
        self._ended: queue.Queue[str] = queue.Queue()
        self._seen = time.monotonic()
        try:
            self._join()
            if not self._probed:
                raise ConfigError(
                    f"The Dask cluster at {address} has no worker.",
                    next_step=f"Start some: dask worker {address} --nthreads 1.",
                    code="no-cluster",
                )
            for worker, why in self._probed.items():
                if why:
                    raise ConfigError(
                        f"The worker {worker} cannot take part: {why}.",
                        next_step="See what workers need in docs/records/sweeps.md, or take it out of the cluster.",
                        code="cluster-worker",
                    )
        except BaseException:
            self._client.close()
            raise

    def _alive(self) -> list[str]:
        return sorted(self._client.scheduler_info(n_workers=-1)["workers"])

    def _join(self) -> list[str]:
        """The workers that can take part; those that are new are probed."""
        alive = self._alive()
        new = [worker for worker in alive if worker not in self._probed]
        if new:
            said = self._client.run(probe, self._asked, workers=new, on_error="return")
            self._probed |= {
                worker: answer if isinstance(answer, str) else f"it answers {type(answer).__name__}: {answer}"
                for worker, answer in said.items()
            }
        return [worker for worker in alive if self._probed.get(worker) == ""]

    @property
    def capacity(self) -> int:
        """How many tasks it can run at once."""
        count = len(self._join())
        return count if self._most is None else min(count, self._most)

    def start(self, task: Task) -> None:
        """Begin a task; there is room for it."""
        key = f"rlhf-audit-{task.sweep}-{task.point}-{task.attempt}"
        future = self._client.submit(run_task, task, key=key, pure=False, workers=self._join(), retries=0)
        self._running[key] = (task, future)
        future.add_done_callback(lambda done: self._ended.put(done.key))

    def finished(self, timeout: float) -> list[Finished]:
        """What came to an end, after waiting for at most ``timeout`` seconds.

        Raises:
            ConfigError: no worker that can take part was there for a minute.
        """
        try:
            keys = [self._ended.get(timeout=timeout)]
        except queue.Empty:
            self._check_alive()
            return []
        while not self._ended.empty():
            keys.append(self._ended.get_nowait())
        return [self._result(*self._running.pop(key)) for key in keys if key in self._running]

    def _check_alive(self) -> None:
        now = time.monotonic()
        if self._join():
            self._seen = now
        elif now - self._seen > _LOST_SECONDS:
            raise ConfigError(
                "The Dask cluster has had no worker that can take part for a minute.",
                next_step="Start workers, then run the same command again: it does what is missing.",
                code="no-cluster",
            )

    @staticmethod
    def _result(task: Task, future: Any) -> Finished:
        try:
            said: dict[str, Any] = future.result(timeout=CONNECT_SECONDS)
        except Exception as error:
            # The scheduler gives a task up whose workers died one after the other (KilledWorker), or lost it.
            said = {"outcome": "died", "message": f"{type(error).__name__}: {error}", "seconds": 0.0}
        future.release()
        return task, said

    def interrupt(self) -> None:
        """Have everything that runs sealed at the end of its cell; `finished` tells of it."""
        for task, _ in self._running.values():
            stop_file(Path(task.folder), task.sweep).touch()

    def close(self) -> None:
        """Let go of the cluster; it goes on without us."""
        self._asked.clear()
        self._client.close()
