"""Record what other packages compute, for tests/similarity/test_against_packages.py → tests/similarity/packages.json.

    python -m venv SCRATCH && SCRATCH/bin/python -m pip install torch==2.13.0 numpy scipy matplotlib tqdm
    SCRATCH/bin/python -m pip install --no-deps torch-cka==0.21 repsim==0.1.5 cka-pytorch==1.1.3 rsatoolbox==0.3.2 h5py
    SCRATCH/bin/python scripts/record_package_similarity.py

In an environment of its own: the kit needs none of them, and cka-pytorch asks for torchvision, which breaks
transformers. Each package is given the features that `features` makes from a seed;
a package that is not there keeps what was recorded before.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import warnings
from pathlib import Path

import numpy as np

RECORDED = Path(__file__).parents[1] / "tests" / "similarity" / "packages.json"
N, WIDTHS = (
    40,
    ((6, 9), (12, 5, 50)),
)  # rows; widths of student and teacher layers: the last is wider than there are rows


def features(n: int = N, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Student and teacher layers (n, d), float64, that share some directions."""
    random = np.random.default_rng(seed)
    shared = random.normal(size=(n, 4))
    return tuple(  # type: ignore[return-value]
        [shared @ random.normal(size=(4, d)) + random.normal(size=(n, d)) + 0.5 for d in widths] for widths in WIDTHS
    )


def torch_cka(batches: int) -> list[list[float]]:
    """torch-cka over models whose layers hand on the features; it runs in float32."""
    import torch
    from torch_cka import CKA

    class Layers(torch.nn.Module):
        def __init__(self, widths: tuple[int, ...]) -> None:
            super().__init__()
            self.widths = widths
            for i in range(len(widths)):
                self.add_module(f"layer{i}", torch.nn.Identity())

        def forward(self, x: torch.Tensor) -> None:
            for i, part in enumerate(x.split(self.widths, dim=1)):
                self.get_submodule(f"layer{i}")(part)

    class Rows(torch.utils.data.Dataset):
        def __init__(self, layers: list[np.ndarray]) -> None:
            self.x = torch.from_numpy(np.concatenate(layers, axis=1)).float()

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, i: int) -> tuple[torch.Tensor]:
            return (self.x[i],)

    sides, loaders = [Layers(widths) for widths in WIDTHS], []
    names = [[f"layer{i}" for i in range(len(widths))] for widths in WIDTHS]
    for layers in features():
        loaders.append(torch.utils.data.DataLoader(Rows(layers), batch_size=N // batches))
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        comparison = CKA(*sides, "student", "teacher", *names)
        comparison.compare(*loaders)
    return comparison.export()["CKA"].tolist()


def cka_pytorch() -> list[list[float]]:
    """cka-pytorch's HSIC₁ in float64, of each student with each teacher layer (its calculator adds 1e-4 below the
    root).
    """
    import torch

    [folder] = [p for p in importlib.metadata.files("cka-pytorch") if p.name == "hsic.py"]
    spec = importlib.util.spec_from_file_location(
        "cka_pytorch_hsic", folder.locate()
    )  # the package itself needs lightning
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    grams = [torch.stack([torch.from_numpy(x @ x.T) for x in layers]) for layers in features()]
    return [[float(module.hsic1(k[None], m[None])) for m in grams[1]] for k in grams[0]]


def repsim(function: str, estimator: str) -> list[list[float]]:
    """repsim.cka or repsim.hsic of all layers with linear kernels; the block of student with teacher layers."""
    import repsim as package

    students, teachers = features()
    matrix = getattr(package, function)([*students, *teachers], kernel_type="linear", estimator=estimator)
    return matrix[: len(students), len(students) :].tolist()


def rsatoolbox() -> list[list[float]]:
    """Spearman of the correlation-distance matrices, without ties."""
    from rsatoolbox.data import Dataset
    from rsatoolbox.rdm import calc_rdm, compare_spearman

    rdms = [[calc_rdm(Dataset(x), method="correlation") for x in layers] for layers in features()]
    return [[float(compare_spearman(a, b)[0, 0]) for b in rdms[1]] for a in rdms[0]]


WHAT = {
    "torch-cka, one batch": ("torch-cka", lambda: torch_cka(1)),
    "torch-cka, four batches": ("torch-cka", lambda: torch_cka(4)),
    "cka-pytorch, HSIC₁": ("cka-pytorch", cka_pytorch),
    "repsim, biased CKA": ("repsim", lambda: repsim("cka", "gretton")),
    "repsim, debiased HSIC": ("repsim", lambda: repsim("hsic", "song")),
    "repsim, debiased CKA": ("repsim", lambda: repsim("cka", "song")),
    "rsatoolbox, spearman": ("rsatoolbox", rsatoolbox),
}


def main() -> None:
    recorded = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}
    for name, (package, compute) in WHAT.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: {package} is not installed here; kept: {name in recorded}")
            continue
        recorded[name] = {"package": f"{package}=={version}", "values": compute()}
        print(f"{name}: {recorded[name]['package']}")
    RECORDED.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
