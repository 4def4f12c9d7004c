"""The one entry point.

    python launch/main.py --config=launch/configs/<name>.py[:variant] --workdir=DIR [--config.a.b=value]

`--config.mode` is one of train, evaluate, generate, compile, benchmark.
"""

import glob
import importlib
import os
import pathlib
import sys

if __name__ == "__main__":  # a script's own folder comes first otherwise, and its files would shadow other packages
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from absl import app, flags, logging
from ml_collections import config_flags

from launch.config import ConfigError, check

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a file of launch/configs", lock_config=False, accept_new_attributes=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; a stopped run goes on from what is there")


def dispatch(config, workdir: pathlib.Path) -> None:
    """Runs config.mode in workdir.

    Raises:
      ConfigError: the config is wrong.
    """
    check(config)
    importlib.import_module(f"launch.{config.mode}").run(config, workdir)


def with_huge_pages() -> None:
    """Starts this process anew with huge pages under glibc's malloc, on a Linux host without an accelerator.

    XLA's CPU client allocates the temporaries of a step at every call. A gigabyte of them comes as a quarter of a
    million page faults otherwise, more than a tenth of the step's time. glibc reads GLIBC_TUNABLES only when a process
    starts; what the environment says already stays.
    """
    accelerators = any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*"))
    if accelerators or not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(argv: list[str]) -> None:
    """Checks the command line, then runs."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options are written --config.key=value")
    from launch.mesh import initialise_processes

    if logging.get_verbosity() == logging.INFO:  # what absl sets; --verbosity=1 shows everything
        logging.set_verbosity(logging.WARNING)
    initialise_processes()
    workdir = pathlib.Path(str(_WORKDIR.value)).expanduser()
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        dispatch(_CONFIG.value, workdir)
    except ConfigError as error:
        logging.debug("traceback", exc_info=True)
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    with_huge_pages()
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
