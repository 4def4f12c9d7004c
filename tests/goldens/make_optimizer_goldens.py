"""Writes optimizers.npz: a least-squares problem with noise, and the iterates of the authors' optimisers on it.

Every case holds the parameters after each step. The gradient of step k is weight (x - target) + noise_k. Needs
dadaptation 3.2, prodigyopt 1.1.2, schedulefree 1.4.1, galore-torch 1.0 (and bitsandbytes, which it imports), sgd-sai
1.0.3, kron-torch 0.3.3, badam 1.4, psgd-jax 0.2.9 (with optax 0.2.4) and torch, which are not what the tests need.
PSGD's probe vectors are recorded with its iterates; singular vectors have one sign.
Run from the root of the repository: TORCHDYNAMO_DISABLE=1 python -m tests.goldens.make_optimizer_goldens
"""

import contextlib
import io
import random
import warnings
from pathlib import Path

import badam
import dadaptation
import galore_torch
import jax
import jax.numpy as jnp
import kron_torch
import numpy as np
import prodigyopt
import schedulefree
import sgd_sai
import torch
from psgd_jax import low_rank_approximation

SHAPES = {"tall": (6, 4), "wide": (3, 5), "cube": (2, 3, 4), "vector": (7,)}
LAYERS, LAYER = 3, {"w": (4, 5), "b": (5,)}
STEPS = 20


def draw(rng, shapes):
    def tensors(scale):
        return {name: rng.normal(0.0, scale, shape) for name, shape in shapes.items()}

    noise = {name: rng.normal(0.0, 0.3, (STEPS, *shape)) for name, shape in shapes.items()}
    weight = {name: rng.uniform(0.1, 2.0, shape) for name, shape in shapes.items()}
    return {"start": tensors(1.0), "target": tensors(1.0), "weight": weight, "noise": noise}


def iterate(problem, make, dtype, steps=STEPS, read=None):
    """Parameters after every step, {name: [steps, ...]}; `read` may look at others than those that are trained."""
    params = {n: torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for n, x in problem["start"].items()}
    optimizer = make(params)
    rows = {name: [] for name in params}
    for k in range(steps):
        for name, p in params.items():
            target, weight, noise = (
                torch.tensor(problem[key][name], dtype=dtype) for key in ("target", "weight", "noise")
            )
            if p.requires_grad:
                p.grad = weight * (p.data - target) + noise[k]
        optimizer.step()
        for name, p in params.items():
            rows[name].append((read(optimizer, p) if read else p.data).double().numpy().copy())
    return {name: np.stack(values) for name, values in rows.items()}


def averaged(optimizer, p):
    """x of a schedule-free method: x = y + (1 - 1 / b1) (z - y)."""
    beta = optimizer.param_groups[0].get("momentum", optimizer.param_groups[0].get("betas", (0.9,)))
    beta = beta[0] if isinstance(beta, tuple) else beta
    return p.data + (1 - 1 / beta) * (optimizer.state[p]["z"] - p.data)


def trained(optimizer):
    optimizer.train()
    return optimizer


@contextlib.contextmanager
def signed_svd():
    """Singular vectors whose largest elements are positive, where LAPACK leaves the signs open."""
    svd = torch.linalg.svd

    def signed(matrix, **options):
        u, s, vh = svd(matrix, **options)
        largest = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        return u * largest, s, vh * vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()

    torch.linalg.svd = signed
    yield
    torch.linalg.svd = svd


def simple_cases():
    """{name: (make, dtype, read)}."""
    f64, f32 = torch.float64, torch.float32
    free = {"lr": 1.0, "d0": 1e-3}
    galore = {"rank": 2, "update_proj_gap": 5, "scale": 0.25}

    def galore_adamw(kind):
        def make(params):
            matrices = [params["tall"], params["wide"]]
            groups = [{"params": [params["cube"], params["vector"]]}, {"params": matrices, "proj_type": kind, **galore}]
            return galore_torch.GaLoreAdamW(groups, lr=0.05, eps=1e-8, weight_decay=0.0, no_deprecation_warning=True)

        return make

    return {
        "dadapt_sgd": (lambda p: dadaptation.DAdaptSGD(list(p.values()), momentum=0.5, **free), f64, None),
        "dadapt_sgd_growth": (
            lambda p: dadaptation.DAdaptSGD(list(p.values()), growth_rate=1.2, weight_decay=0.1, **free),
            f64,
            None,
        ),
        "dadapt_adagrad": (lambda p: dadaptation.DAdaptAdaGrad(list(p.values()), momentum=0.5, **free), f64, None),
        "dadapt_adamw": (
            lambda p: dadaptation.DAdaptAdam(list(p.values()), use_bias_correction=True, **free),
            f64,
            None,
        ),
        "prodigy": (lambda p: prodigyopt.Prodigy(list(p.values()), use_bias_correction=True, **free), f64, None),
        "schedule_free_adamw": (
            lambda p: trained(schedulefree.AdamWScheduleFree(list(p.values()), lr=0.05, foreach=False)),
            f64,
            None,
        ),
        "schedule_free_sgd": (
            lambda p: trained(schedulefree.SGDScheduleFree(list(p.values()), lr=0.2, foreach=False)),
            f64,
            None,
        ),
        "schedule_free_sgd_average": (
            lambda p: trained(schedulefree.SGDScheduleFree(list(p.values()), lr=0.2, foreach=False)),
            f64,
            averaged,
        ),
        "sgd_sai": (lambda p: sgd_sai.SGD_sai(list(p.values()), lr=0.02, weight_decay=0.1), f64, None),
        "galore_smaller": (galore_adamw("std"), f32, None),
        "galore_larger": (galore_adamw("reverse_std"), f32, None),
    }


def kron_case(problem, mode):
    """Iterates, and the probes {name: [steps, ...]} in the merged shapes."""
    probes, draw_probe = [], torch.randn_like
    torch.manual_seed(0)

    def recording(x, *args, **kwargs):
        probes.append(draw_probe(x, *args, **kwargs))
        return probes[-1]

    torch.randn_like = recording
    inner = kron_torch.kron._update_precond
    # The noise that the update of the factors adds to its gradient in place stays out of the step.
    kron_torch.kron._update_precond = lambda q, exprs, g, *rest: inner(q, exprs, g.clone(), *rest)
    try:
        make = lambda p: kron_torch.Kron(  # noqa: E731
            list(p.values()), lr=0.02, weight_decay=0.1, memory_save_mode=mode, preconditioner_update_probability=1.0
        )
        rows = iterate(problem, make, torch.float32)
    finally:
        torch.randn_like = draw_probe
        kron_torch.kron._update_precond = inner
    names = list(problem["start"])
    return rows, {name: np.stack([x.numpy() for x in probes[i :: len(names)]]) for i, name in enumerate(names)}


def badam_case(problem):
    """Layers one after another from the last, 4 steps each (3 for the first of all); the embedding stays."""
    torch.manual_seed(0)
    random.seed(0)

    def make(params):
        adam = torch.optim.AdamW(list(params.values()), lr=0.05, weight_decay=0.0)
        return badam.BlockOptimizer(
            base_optimizer=adam,
            named_parameters_list=list(params.items()),
            switch_block_every=4,
            switch_mode="descending",
            verbose=0,
            include_embedding=False,
            include_lm_head=False,
        )

    return iterate(problem, make, torch.float32)


def low_rank_case(rng, size=12, rank=3):
    """U, V and d after each update of psgd-jax's preconditioner, and what it makes of a gradient at the end."""
    u, v = rng.normal(0.0, 0.4, (2, size, rank))
    d, h = rng.uniform(0.5, 2.0, (size, 1)), rng.normal(0.0, 2.0, (STEPS, size, 1))
    probes, keys = rng.normal(0.0, 1.0, (STEPS, size, 1)), jax.random.split(jax.random.key(0), STEPS)
    start = {"u": u, "v": v, "d": d[:, 0]}
    u, v, d, h, probes = (jnp.asarray(x, jnp.float32) for x in (u, v, d, h, probes))
    rows = {"u": [], "v": [], "d": [], "coin": []}
    for k in range(STEPS):
        balance, coin = (float(jax.random.uniform(key)) for key in jax.random.split(keys[k])[::-1])
        assert balance >= 0.01
        u, v, d = low_rank_approximation._update_precond_UVd_math(
            keys[k], u, v, d, probes[k], h[k], 0.1, "2nd", "float32"
        )
        for name, x in zip(rows, (u, v, d[:, 0], coin < 0.5), strict=True):
            rows[name].append(np.asarray(x))
    white = low_rank_approximation._precond_grad_UVd_math(u, v, d, h[0])[:, 0]
    given = {f"start/{name}": x for name, x in start.items()} | {
        "h": h[..., 0],
        "probe": probes[..., 0],
        "white": white,
    }
    return {name: np.stack(x) for name, x in rows.items()} | given


def main():
    rng = np.random.default_rng(0)
    problem = draw(rng, SHAPES)
    names = [f"model.layers.{i}.{leaf}" for i in range(LAYERS) for leaf in LAYER]
    layered = draw(rng, {name: LAYER[name.rpartition(".")[2]] for name in names} | {"embed.weight": (3, 2)})
    found = {}
    for prefix, given in (("problem", problem), ("layered", layered)):
        found |= {f"{prefix}/{key}/{name}": x for key, tensors in given.items() for name, x in tensors.items()}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), signed_svd():
        warnings.simplefilter("ignore")
        for case, (make, dtype, read) in simple_cases().items():
            found |= {f"{case}/{name}": rows for name, rows in iterate(problem, make, dtype, read=read).items()}
        for case, mode in (("kron", None), ("kron_one_diag", "one_diag")):
            rows, probes = kron_case(problem, mode)
            found |= {f"{case}/{name}": x for name, x in rows.items()}
            found |= {f"{case}/probe/{name}": x for name, x in probes.items()}
        found |= {f"badam/{name}": rows for name, rows in badam_case(layered).items()}
    found |= {f"low_rank/{name}": x for name, x in low_rank_case(rng).items()}
    np.savez_compressed(Path(__file__).parent / "optimizers.npz", **found)


if __name__ == "__main__":
    main()
