"""mode=compile: the sharded training step compiled ahead of time, for a TPU pod that is not there.

With config.topology ("v5p:8x8x8", ...) libtpu compiles to machine code for those chips on any Linux machine; without it
the step is compiled for the devices of this one. Nothing is read of data. Of the run that config.initial or
config.teacher names, its config is read where the step takes a reference or the model is made from it, and no
parameters: its folder may hold nothing else.
"""

import collections
import glob
import os
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
import rich.console
import rich.table

from launch import config as config_lib
from launch import data as data_lib
from launch import losses as losses_lib
from launch import mesh as mesh_lib
from launch import rollout as rollout_lib
from launch import run as run_lib
from launch.config import ConfigError
from pallas_kernels.static_profile import chips
from zoo.core.params import count

# Bytes of memory of one jax device, from the vendor's documentation. v7x counts two devices per chip.
HBM = {"v4": 32 << 30, "v5e": 16 << 30, "v5p": 95 << 30, "v6e": 32 << 30, "tpu7x": 96 << 30}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def run(config: Any, workdir: pathlib.Path) -> None:
    """Compiles the step, prints memory per device and collectives by kind, writes compile.json.

    Raises:
      ConfigError: unknown topology, sizes that do not divide, no vocabulary size, or a step that does not fit the
        memory of a device.
    """
    config_lib.check(config)
    plain = run_lib.resolve(config, 1)
    if config.model.get("vocab_size") is None:
        raise ConfigError("mode=compile reads no data: give config.model.vocab_size")
    devices = topology_devices(config.topology) if config.topology else jax.devices()
    limit = HBM[config.topology.split(":")[0]] if config.topology else None
    with config_lib.at("mesh and config.rules"):
        mesh, rules = mesh_lib.make(plain, devices)
    losses_lib.create_objective(plain)
    with config_lib.at("rollout"):
        rollout_lib.check(plain, losses_lib.category(plain))
    with config_lib.at("data"):
        shapes = data_lib.batch_shapes(plain)
    with config_lib.at("batch_size"):
        batch = {
            name: jax.ShapeDtypeStruct(
                shape, dtype, sharding=mesh_lib.batch_sharding(shape, mesh, rules, plain["sequence_length"])
            )
            for name, (shape, dtype) in shapes.items()
        }
    program = run_lib.assemble(plain, mesh, rules, concrete=False)
    teacher = None if "ref_logps" in batch else program.teacher
    start = time.perf_counter()
    with program.active(), tempfile.TemporaryDirectory() as folder:
        lowered = program.train_step.lower(program.abstract, batch, teacher)
        try:
            # The text comes from the compiler's own dump: libtpu's module may hold operations that jaxlib cannot print.
            compiled = lowered.compile(
                compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": ""}
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise ConfigError(_too_large(plain, str(error).splitlines()[0])) from error
            raise
        collectives = count_collectives(_optimised_text(folder))
    report = {
        "model": plain["model"]["name"],
        "parameters": count(program.model.param_specs()),
        "topology": config.topology or jax.devices()[0].device_kind,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "batch": batch["tokens"].shape,
        "compile_seconds": round(time.perf_counter() - start, 1),
        "bytes_per_device": memory(compiled),
        "hbm_bytes": limit,
        "collectives": collectives,
    }
    _print(report)
    config_lib.write_json(workdir / "compile.json", report)
    if limit is not None and report["bytes_per_device"]["total"] > limit:
        raise ConfigError(_too_large(plain, f"{report['bytes_per_device']['total']:,} bytes of {limit:,} per device"))


def topology_devices(name: str) -> list[Any]:
    """Devices of a TPU topology such as "v5p:8x8x8", for compilation alone.

    Raises:
      ConfigError: the name has another form or kind, libtpu is missing, or it knows no such topology.
    """
    if not re.fullmatch(rf"({'|'.join(HBM)}):\d+x\d+(x\d+)?", name):
        raise ConfigError(f"config.topology={name!r} must look like v5e:16x16 or v5p:8x8x8; kinds: {', '.join(HBM)}")
    try:
        return chips.devices(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def memory(compiled: Any) -> dict[str, int]:
    """Bytes per device: arguments, outputs that are not arguments, temporaries, and their total."""
    analysis = compiled.memory_analysis()
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}


def count_collectives(hlo: str) -> dict[str, int]:
    """Instructions of a compiled program by kind of collective; one inside a loop counts once."""
    found = collections.Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", hlo))
    return {kind: found[kind] for kind in COLLECTIVES if found[kind]}


def _optimised_text(folder: str) -> str:
    paths = glob.glob(f"{folder}/*train_step*after_optimizations.txt")
    if not paths:
        raise RuntimeError(f"the compiler left no optimised program among {sorted(os.listdir(folder))}")
    return pathlib.Path(paths[0]).read_text()


def _too_large(plain: dict[str, Any], what: str) -> str:
    return (
        f"the step of {plain['model']['name']} does not fit the device: {what}. Lower config.batch_size, raise "
        "config.accumulation, set config.model.remat=full, or split over more of config.mesh.fsdp"
    )


def _print(report: dict[str, Any]) -> None:
    console = rich.console.Console(width=120)
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1) or "one device"
    console.print(
        f"{report['model']}, {report['parameters']:,} parameters, batch {' x '.join(map(str, report['batch']))}, "
        f"on {report['devices']} x {report['topology']} ({mesh}); compiled in {report['compile_seconds']} s"
    )
    table = rich.table.Table("per device", "GiB", "of HBM")
    for part, size in report["bytes_per_device"].items():
        share = f"{size / report['hbm_bytes']:.1%}" if report["hbm_bytes"] else ""
        table.add_row(part, f"{size / (1 << 30):.3f}", share)
    console.print(table)
    kinds = rich.table.Table("collective", "instructions")
    for kind, instructions in report["collectives"].items():
        kinds.add_row(kind, str(instructions))
    console.print(kinds)
