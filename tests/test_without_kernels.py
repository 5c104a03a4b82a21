"""The library without `scoresde/kernels/`: the CUDA implementation is an addition, and nothing stands on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import scoresde

CODE = """
import warnings
import torch
import scoresde as S
from scoresde import ops

torch.manual_seed(0)
assert S.__file__.startswith(FOLDER)
sde = S.VPSDE()
model = S.Preconditioned(S.nn.MLP((2,), width=16, depth=1), sde, S.EDM())
loss, optimizer = S.DenoisingLoss(model), torch.optim.Adam(model.parameters(), 1e-2)
data, rng = torch.randn(64, 2, generator=torch.Generator().manual_seed(1)), S.Rng(0)
losses = []
for _ in range(60):
    value = loss(data, rng=rng).mean()
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    losses.append(float(value))
assert sum(losses[-20:]) < sum(losses[:20]), losses
step = S.PredictorCorrector(S.ReverseDiffusion(), S.Langevin())
assert S.Sampler(step, steps=10)(model, (8, 2), rng=S.Rng(1)).isfinite().all()
assert S.log_likelihood(model, data[:4], S.Tolerance(1e-3, 1e-3)).log_prob.isfinite().all()

gpu = torch.device("cuda", 0)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not any(ops.enabled(gpu, torch.float32) for _ in range(2))
assert len(said) == 1 and "they are not installed (No module named 'scoresde.kernels'" in str(said[0].message), said
ops.use("require")
try:
    ops.enabled(gpu, torch.float32)
except RuntimeError as error:
    assert "they are not installed" in str(error)
else:
    raise SystemExit("it did not raise")
"""


def test_everything_works_with_the_folder_deleted(tmp_path: Path) -> None:
    """Import, training, sampling and likelihood; a tensor on a GPU is told why it has no kernels."""
    package = Path(scoresde.__file__).parent
    shutil.copytree(package, tmp_path / "scoresde", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("SCORESDE_KERNELS", None)
    code = CODE.replace("FOLDER", repr(str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
