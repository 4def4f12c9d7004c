"""Compiles programs for a TPU topology in a process whose libtpu was told to dump its schedules.

Run by `profile.compile_programs`: `python -m pallas_kernels.static_profile.worker REQUESTS.json`.
"""

import faulthandler
import importlib
import json
import pathlib
import sys
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.static_profile import chips

LIMIT = 3600  # seconds for one program; a compiler that hangs ends the process with a trace of where
KEPT = ("final_bundles.txt", "final_hlo-static-per-bundle-utilization.txt", "-hlo.txt", "deduplication-map.txt")


def main(path: str) -> None:
    """Compiles every request; leaves the dumps of the i-th in the folder i beside it and the outcomes in outcomes.json.

    Args:
      path: a JSON file {"topology", "dumps" (folder), "requests": [{"call": "module:function", "arguments": {}}]}.
    """
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    job = json.loads(pathlib.Path(path).read_text())
    sharding = SingleDeviceSharding(chips.devices(job["topology"])[0])
    dumps = pathlib.Path(job["dumps"])
    outcomes = []
    for index, request in enumerate(job["requests"]):
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        outcomes.append(_compile(request, sharding))
        folder = dumps.parent / str(index)
        folder.mkdir()
        for dump in list(dumps.iterdir()):
            if dump.name.endswith(KEPT) and "schedule-analysis" not in dump.name:
                dump.rename(folder / dump.name)
            else:
                dump.unlink()
    (dumps.parent / "outcomes.json").write_text(json.dumps(outcomes))
    faulthandler.cancel_dump_traceback_later()


def _compile(request: dict[str, Any], sharding: Any) -> dict[str, str]:
    module, name = request["call"].split(":")
    try:
        function, arguments = getattr(importlib.import_module(module), name)(**request["arguments"])
        arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
        jax.jit(function).lower(*arguments).compile()
    except UnsupportedError as error:
        return {"unsupported": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
    return {}


if __name__ == "__main__":
    main(sys.argv[1])
