"""Other processes, for tests that kill one or need two; their server imports PyTorch once, so each starts quickly."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
# After the first, what PyTorch's optimisers, a sharded checkpoint and the drawing of losses import at first use.
_CONTEXT.set_forkserver_preload(
    ["tests.support.toy", "torch._dynamo", "torch.distributed.checkpoint", "matplotlib.figure", "PIL.Image"]
)


def start(function: Callable[..., None], *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """A process that runs function on as many threads as this one."""
    process = _CONTEXT.Process(
        target=_run, args=(function, arguments, environment or {}, torch.get_num_threads()), daemon=True
    )
    process.start()
    return process


def start_ranks(world_size: int, function: Callable[..., None], *arguments: Any, errors: Path) -> list[Any]:
    """world_size processes with the variables that torchrun sets, which run function."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ERRORS": str(errors)}
    return [
        start(function, *arguments, environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]


def run_ranks(world_size: int, function: Callable[..., None], *arguments: Any, errors: Path) -> None:
    """Run function in world_size processes; fail with their traceback."""
    processes = start_ranks(world_size, function, *arguments, errors=errors)
    for process in processes:
        process.join(60)
        if process.exitcode is None:
            process.kill()  # it waits for another for ever, say
            process.join()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * world_size, f"exit codes {codes}: {errors.read_text() if errors.exists() else 'no traceback'}"


def _run(function: Callable[..., None], arguments: tuple, environment: dict[str, str], threads: int) -> None:
    os.environ.update(environment)
    torch.set_num_threads(threads)
    try:
        function(*arguments)
    except BaseException:
        if errors := environment.get("ERRORS"):
            with open(errors, "a") as file:
                file.write(traceback.format_exc())
        raise
