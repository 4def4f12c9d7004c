"""Writes mergekit_sce.npz: random parameters, and what mergekit's SCE makes of them.

Needs torch and mergekit 0.1.5 (`pip install --no-deps mergekit==0.1.5` beside what the tests need). In float32, as
models are merged. Run from the root of the repository: python -m tests.goldens.make_merge_goldens
"""

from pathlib import Path
from types import SimpleNamespace

import mergekit.merge_methods.sce as oracle
import numpy as np
import torch

SHAPES = {"matrix": (4, 5), "vector": (7,), "stack": (3, 2, 2)}
MODELS, KEEPS = 3, (0.0, 0.1, 0.45, 1.0)


def main() -> None:
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in SHAPES.items():
        base = rng.normal(size=shape).astype(np.float32)
        tuned = (base + rng.normal(size=(MODELS, *shape))).astype(np.float32)
        # Entries that all models changed alike, by a number whose mean is exact: a variance that is 0 but for
        # rounding would count as one that is not.
        base[..., 0], tuned[:, ..., 0] = 0.0, 0.125
        tuned[:, ..., 1] = base[..., 1]  # entries that none did
        found |= {f"{name}/base": base, f"{name}/tuned": tuned}
        for keep in KEEPS:
            group = SimpleNamespace(
                base=SimpleNamespace(tensor=torch.tensor(base)),
                non_base=[SimpleNamespace(tensor=torch.tensor(x)) for x in tuned],
            )
            merged = oracle.sce_merge.implementation(group, select_topk=keep)
            found[f"{name}/{keep}"] = merged.numpy()
    np.savez_compressed(Path(__file__).with_name("mergekit_sce.npz"), **found)


if __name__ == "__main__":
    main()
