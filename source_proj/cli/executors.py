"""Who does the work of ``score`` and ``top-k``: this process, others of this machine, or a Dask cluster."""

import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from source_proj._errors import extra
from source_proj._io.executors import Executor

__all__ = ["executor_of"]


@contextmanager
def executor_of(options: Mapping[str, Any]) -> Iterator[Executor | None]:
    """The executor that ``--workers`` or ``--dask`` names, as long as it is needed; None for this process.

    Processes of this machine share its cores: each takes its part of torch's threads.

    Raises:
        ValueError: both are given.
        ImportError: Dask is missing; names the extra.
    """
    workers, address = options["workers"], options["dask"]
    if workers is not None and address is not None:
        raise ValueError("--workers and --dask name different workers: leave one of them out")
    if address is not None:
        with extra("dask"):
            from distributed import Client
        try:
            client = Client(address, timeout=30)
        except OSError as error:
            raise ValueError(f"no Dask scheduler answers at --dask {address!r}: {error}") from error
        with client:
            yield client.get_executor()
    elif workers is not None and workers > 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // workers))
        try:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as processes:
                yield processes
        finally:
            torch.set_num_threads(threads)
    else:
        yield None
