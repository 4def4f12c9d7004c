"""The other side of mode=benchmark: a transformers model on torch, in a process of its own.

    python -m launch.peer FOLDER THREADS DECODE_TOKENS

Answers each line of standard input with one line: "prefill 1024", "decode 128" and "train 2 128" (rows, tokens) run
once and print the seconds they took by the wall clock, and those of the CPU in all threads.
"""

import contextlib
import copy
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


class Peer:
    """A program of `launch` that answers lines, in a process of its own; a context manager."""

    def __init__(self, module: str, *arguments: str, threads: int, **environment: str):
        root = pathlib.Path(__file__).resolve().parents[1]
        inherited = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}  # launch/main.py's own
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**inherited, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), **environment},
        )

    def ask(self, line: str) -> str:
        """The answer to a line.

        Raises:
          RuntimeError: the peer has stopped; its own message is on standard error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the peer stopped at {line!r} with status {self._process.wait()}")
        return answer

    def side(self, line: str) -> Callable[[], float]:
        """A function that has the peer run `line` once and returns the seconds of the wall clock that it answers."""
        return lambda: self.seconds(line)[0]

    def seconds(self, line: str) -> tuple[float, ...]:
        """The numbers of the answer: seconds of the wall clock and, from this module's program, of the CPU."""
        return tuple(map(float, self.ask(line).split()))

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *exc: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # end of input ends the peer
        self._process.wait()


def _prefill(model: Any, length: int) -> Callable[[], Any]:
    import torch

    tokens = torch.randint(0, model.config.vocab_size, (1, length))

    @torch.no_grad()
    def run():
        model.eval()
        model(tokens, use_cache=True, logits_to_keep=1)

    return run


def _decode(model: Any, prompt: int, steps: int) -> Callable[[], Any]:
    import torch

    with torch.no_grad():
        start = model.eval()(torch.randint(0, model.config.vocab_size, (1, prompt)), use_cache=True)
    cache = "cache_params" if hasattr(start, "cache_params") else "past_key_values"

    @torch.no_grad()
    def run():
        state, token = copy.deepcopy(start[cache]), torch.zeros((1, 1), dtype=torch.long)
        for _ in range(steps):
            out = model(token, use_cache=True, **{cache: state})
            token = out.logits[:, -1:].argmax(-1)

    return run


def _train(model: Any, rows: int, length: int) -> Callable[[], Any]:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tokens = torch.randint(0, model.config.vocab_size, (rows, length))

    def run():
        model.train()
        optimizer.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()

    return run


def main(folder: str, threads: int, decode_tokens: int) -> None:
    """Serves the lines of standard input."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sides: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        kind, *sizes = line.split()
        if line not in sides:
            make = {"prefill": _prefill, "decode": lambda m, n: _decode(m, n, decode_tokens), "train": _train}[kind]
            sides[line] = make(model, *map(int, sizes))
        wall, cpu = time.perf_counter(), time.process_time()
        sides[line]()
        print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
