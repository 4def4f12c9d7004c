"""Claims of papers in the small: runs the configs, and writes docs/claims.md and its pictures from what they leave.

    python docs/claims.py state_tracking --seeds=3 --runs=runs/claims

Runs that have ended are not repeated, so the same command goes on where it stopped; --seeds=0 only writes the page.
"""

import argparse
import csv
import dataclasses
import importlib
import json
import math
import pathlib
import statistics
import sys
import textwrap
from typing import Any

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])  # the packages of this tree, not of this folder

from launch.configs import recall  # noqa: E402

PAGE = pathlib.Path(__file__).with_name("claims.md")
RECENT = 5  # rows of metrics.csv at the end of a run whose mean is its training accuracy
LENGTHS_FILE = "lengths.json"  # beside summary.json: {length: perplexity}
HELD_OUT = 1 << 15  # tokens of held-out text that perplexities are of
TOKENS = 1 << 13  # of one batch of them


@dataclasses.dataclass(frozen=True)
class Claim:
    """Variants of one config that differ in the architecture, and what of their runs is compared.

    Attributes:
      title, text: of its section.
      config: the module of launch.configs; its variants are `variants`.
      variants: names.
      measures: column of the table -> column of metrics.csv.
      guess: what chance reaches, drawn as a line.
      state_at: tokens at which the size of a variant's state is a column, and the axis of the picture.
      lengths: of rows of held-out text, whose perplexities are more columns and the picture: {column: tokens}.
    """

    title: str
    text: str
    config: str
    variants: tuple[str, ...]
    measures: dict[str, str]
    guess: float | None = None
    state_at: int | None = None
    lengths: dict[str, int] = dataclasses.field(default_factory=dict)


CLAIMS = {
    "state_tracking": Claim(
        "State tracking",
        "Products of permutations of three things: the target at every token is the product of all so far "
        "(arXiv:2404.08819). Recurrences that are not linear in their state can hold it at any length; attention and "
        "linear recurrences with diagonal, positive transitions need depth that grows with the length. Trained on rows "
        "of 12 tokens, of which the last ones, new to the model, give the first column, and evaluated on rows of 48. "
        "Of the nonlinear recurrences the one with exponential gates holds the state beyond what it was trained on; "
        "the vanilla LSTM, at the same learning rate, does not learn the short rows reliably.",
        "state_tracking",
        ("slstm", "lstm", "mamba", "attention"),
        {"12 tokens": "accuracy", "48 tokens": "validation_accuracy"},
        1 / 6,
    ),
    "recall": Claim(
        "Recall and the size of the state",
        "Pairs of a key and a value, 8 in 32 tokens, and then every key once more: the target is its value "
        "(arXiv:2312.04927). Models of two layers and one width, a gated convolution and the mixer that gives the row "
        "its name; a number is the size of its state: the window of attention, feature channels of Based "
        "(arXiv:2402.18668), states per channel of Mamba and Mamba-2, channels of a key of GLA and mLSTM. The state "
        "is that of both layers, keys and values in float32. Accuracy is of rows that no model was trained on. Of the "
        "learning rates 0.004 and 0.012 the first seed chose one per mixer, at the larger size: 0.012 for Mamba-2. "
        "Attention answers every query, and so do Based, GLA and mLSTM with a sixth to less than a third of its "
        "state; the window misses what it no longer sees. Mamba-2 is where the size of the state decides: a third of "
        "the answers with 4 states per channel, all but one in seventy with 16. So the frontier of the paper's figure "
        "is there, but recurrences with a data-dependent decay and keys of their own lie on it beside Based. Mamba is "
        "the exception: a fifth of the answers at either size, hardly more than a guess among the 8 values of the "
        "row, and no more after 2,000 steps (0.210, one seed, 16 states); a run so short does "
        "not tell whether it is its state or the speed of learning. After 300 steps the order was "
        "another (Mamba-2 0.12 to 0.20, GLA 0.62 to 0.67, mLSTM 0.75 to 0.88).",
        "recall",
        recall.VARIANTS,
        {"accuracy": "validation_accuracy"},
        1 / 32,
        state_at=32,
    ),
    "extrapolation": Claim(
        "Length extrapolation",
        "A Samba (arXiv:2406.07522), Mamba and attention with a window of 256, and a transformer of its width, depth "
        "and number of parameters with full attention and rotary positions, trained on rows of 512 bytes of the "
        "standard library's code. Perplexity per byte of held-out files, the same 32,768 bytes in rows of 1, 2, 4 and "
        "8 times that length: a row starts without what stood before it, so a model that can use more context than it "
        "was trained on gains by the length. Samba gains a little with every doubling; the transformer's perplexity "
        "doubles by 8 times its length.",
        "extrapolation",
        ("samba", "transformer"),
        {},
        lengths={"512 bytes": 512, "1,024": 1024, "2,048": 2048, "4,096": 4096},
    ),
}


def run(claim: Claim, seeds: int, runs: pathlib.Path) -> None:
    """Trains what has not been trained yet, one run at a time, and reads held-out text at every length."""
    import jax

    from launch import train

    jax.config.update("jax_compilation_cache_dir", str(runs / "cache"))  # the seeds of a variant are one program
    for seed in range(seeds):
        for variant in claim.variants:
            workdir = runs / variant / str(seed)
            config = _config(claim, variant, seed, runs)
            if not (workdir / "summary.json").exists():
                print(f"{variant}, seed {seed}", flush=True)
                workdir.mkdir(parents=True, exist_ok=True)
                train.run(config, workdir)
                if not (workdir / "summary.json").exists():
                    sys.exit("stopped; the same command goes on from here")
            if claim.lengths and not (workdir / LENGTHS_FILE).exists():
                found = perplexities(config, workdir, list(claim.lengths.values()))
                (workdir / LENGTHS_FILE).write_text(json.dumps(found, indent=2) + "\n")


def _config(claim: Claim, variant: str, seed: int, runs: pathlib.Path) -> Any:
    config = importlib.import_module(f"launch.configs.{claim.config}").get_config(variant)
    config.seed = seed
    config.log.tensorboard = False
    config.data.directory = str(runs)
    return config


def perplexities(config: Any, workdir: pathlib.Path, lengths: list[int]) -> dict[str, float]:
    """{length: exp(nats per token)} of one held-out text that is cut into rows of every length.

    The text are the longest documents' stretches of the greatest length, evenly drawn, the same for every length: a row
    is read from its first token on, without what stood before it.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import pipelines
    from launch import run as run_lib

    this = run_lib.build(config, workdir)
    assert isinstance(this.data, pipelines.TextDataset)
    _, params = this.restore_params()
    longest = max(lengths)
    stretches = []
    for document in this.data.validation:  # [bos] t1 .. tn [eos]
        pairs = np.stack([document[:-1], document[1:]]).astype(np.int32)
        whole = pairs.shape[1] // longest
        stretches += list(pairs[:, : whole * longest].reshape(2, whole, longest).swapaxes(0, 1))
    if len(stretches) * longest < HELD_OUT:
        raise ValueError(f"held-out text has {len(stretches)} stretches of {longest} tokens, not {HELD_OUT // longest}")
    chosen = np.linspace(0, len(stretches) - 1, HELD_OUT // longest).astype(int)
    tokens, targets = (np.stack([stretches[i][side] for i in chosen]) for side in (0, 1))

    @jax.jit
    def nll(params, tokens, targets):
        logits = jax.nn.log_softmax(this.model.apply(params, tokens).logits)
        return -jnp.take_along_axis(logits, targets[..., None], -1).sum()

    found = {}
    for length in lengths:
        batches = zip(*(x.reshape(-1, TOKENS // length, length) for x in (tokens, targets)), strict=True)
        found[str(length)] = math.exp(sum(float(nll(params, *batch)) for batch in batches) / tokens.size)
    return found


def state_bytes(claim: Claim, variant: str) -> int:
    """Bytes of a row's state after `state_at` tokens, as zoo.describe counts them."""
    import zoo
    from launch.config import options
    from zoo.core.params import nbytes

    name, given = options(_config(claim, variant, 0, pathlib.Path())["model"])
    return nbytes(zoo.create(name, **{"vocab_size": 1, **given}).state_specs(1, claim.state_at))


def collect(claim: Claim, runs: pathlib.Path) -> dict[str, dict[str, list[float]]]:
    """{variant: {column of the table: a value per seed, and "parameters", "seconds"}} of the runs that have ended."""
    found: dict[str, dict[str, list[float]]] = {}
    for variant in claim.variants:
        columns = (*claim.measures, *claim.lengths, "parameters", "seconds")
        values = found.setdefault(variant, {name: [] for name in columns})
        for path in sorted((runs / variant).glob("*/summary.json")):
            summary = json.loads(path.read_text())
            with open(path.with_name("metrics.csv")) as file:
                rows = list(csv.DictReader(file))
            for name, column in claim.measures.items():
                numbers = [float(row[column]) for row in rows if row[column]]
                last = 1 if column.startswith("validation") else RECENT
                values[name].append(statistics.fmean(numbers[-last:]))
            if claim.lengths:
                of_length = json.loads(path.with_name(LENGTHS_FILE).read_text())
                for name, length in claim.lengths.items():
                    values[name].append(of_length[str(length)])
            values["parameters"].append(summary["parameters"])
            values["seconds"].append(summary["wall_seconds"])
    return found


def section(name: str, claim: Claim, found: dict[str, dict[str, list[float]]]) -> str:
    """The claim's part of the page: mean and standard deviation over seeds."""
    lines = [f"## {claim.title}\n", textwrap.fill(claim.text, 120) + "\n"]
    state = [f"state bytes at {claim.state_at} tokens"] if claim.state_at else []
    columns = ["model", "parameters", *state, *claim.measures, *claim.lengths, "seeds", "seconds per run"]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for variant, values in found.items():
        cells = [f"`{variant}`", f"{values['parameters'][0]:,.0f}"]
        cells += [f"{state_bytes(claim, variant):,}"] if claim.state_at else []
        cells += [_spread(values[m]) for m in (*claim.measures, *claim.lengths)]
        cells += [str(len(values["parameters"])), f"{statistics.fmean(values['seconds']):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    chance = "" if claim.guess is None else f"Chance is {claim.guess:.3f}. "
    lines += [f"\n{chance}`python docs/claims.py {name}`\n", f"![{claim.title}](claims_{name}.png)\n"]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    deviation = f" ± {_deviation(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def picture(name: str, claim: Claim, found: dict[str, dict[str, list[float]]]) -> None:
    """What the claim compares, with the standard deviation over seeds, and every seed as a dot."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5 if claim.state_at or claim.lengths else 3))
    if claim.lengths:
        _lengths(axes, claim, found)
    elif claim.state_at:
        _frontier(axes, claim, found)
    else:
        _bars(axes, claim, found)
    if claim.guess is not None:
        axes.axhline(claim.guess, color="grey", linestyle=":", label="chance")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(PAGE.with_name(f"claims_{name}.png"), dpi=120)


def _bars(axes: Any, claim: Claim, found: dict[str, dict[str, list[float]]]) -> None:
    width = 0.8 / len(claim.measures)
    for i, measure in enumerate(claim.measures):
        at = [k + (i - (len(claim.measures) - 1) / 2) * width for k in range(len(found))]
        series = [values[measure] for values in found.values()]
        errors = [_deviation(v) for v in series]
        axes.bar(at, [statistics.fmean(v) for v in series], width, yerr=errors, capsize=3, label=measure, alpha=0.7)
        for x, values in zip(at, series, strict=True):
            axes.plot([x] * len(values), values, "k.", markersize=4)
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylabel("accuracy")


def _frontier(axes: Any, claim: Claim, found: dict[str, dict[str, list[float]]]) -> None:
    """The first measure over the state's size; sizes of one mixer, "mixer-size", are one line."""
    (measure, *_), mixers = claim.measures, dict.fromkeys(variant.partition("-")[0] for variant in found)
    for mixer in mixers:
        points = [(state_bytes(claim, v), found[v][measure]) for v in found if v.partition("-")[0] == mixer]
        _line(axes, mixer, sorted(points))
    axes.set_xscale("log", base=2)
    axes.set(xlabel=f"bytes of state at {claim.state_at} tokens", ylabel=measure)


def _lengths(axes: Any, claim: Claim, found: dict[str, dict[str, list[float]]]) -> None:
    for variant, values in found.items():
        _line(axes, variant, [(length, values[name]) for name, length in claim.lengths.items()])
    ticks = list(claim.lengths.values())
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="tokens", ylabel="perplexity")


def _line(axes: Any, label: str, points: list[tuple[float, list[float]]]) -> None:
    x, means = [at for at, _ in points], [statistics.fmean(values) for _, values in points]
    drawn = axes.errorbar(x, means, [_deviation(values) for _, values in points], fmt="o-", capsize=3, label=label)
    for at, values in points:
        axes.plot([at] * len(values), values, ".", markersize=4, color=drawn[0].get_color(), alpha=0.6)


def updated(text: str, name: str, part: str) -> str:
    """The page with a fresh section between the claim's markers."""
    start, end = f"<!-- {name}: python docs/claims.py {name} -->", f"<!-- end of {name} -->"
    if start not in text:
        text = f"{text.rstrip()}\n\n{start}\n{end}\n"
    before, rest = text.split(start)
    return f"{before}{start}\n\n{part}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claim", choices=sorted(CLAIMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/claims"))
    options = parser.parse_args()
    claim, runs = CLAIMS[options.claim], options.runs.resolve() / options.claim
    run(claim, options.seeds, runs)
    found = collect(claim, runs)
    missing = [variant for variant, values in found.items() if not values["parameters"]]
    if missing:
        parser.error(f"no run of {', '.join(missing)} has ended in {runs}; give --seeds=1 or more")
    PAGE.write_text(updated(PAGE.read_text(), options.claim, section(options.claim, claim, found)))
    picture(options.claim, claim, found)


if __name__ == "__main__":
    main()
