"""The job script of SLURM, run with stand-ins for its commands."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/slurm/train.sbatch"
STAND_INS = {
    "srun": 'shift\nfor n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n SLURM_NTASKS=2 "$@" || code=$?; done\nexit $code',
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "scontrol $*" >> "$CALLS"; fi',
    "mamo": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT: $*" >> "$CALLS"\nexit "$CODE"',
}


@pytest.mark.parametrize("code", [0, 2, 143])
@pytest.mark.parametrize("is_begun", [False, True])
def test_a_job_starts_resumes_and_requeues(tmp_path: Path, code: int, is_begun: bool) -> None:
    """Bug: a saved run is not requeued, a mistake is requeued for ever, a second start fails on the full folder, an
    argument with a space is split, or a process has another rank.
    """
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    run, calls = tmp_path / "run", tmp_path / "calls"
    run.mkdir()
    if is_begun:
        (run / "config.yaml").touch()
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "CODE": str(code),
        "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]",
    }  # fmt: skip
    arguments = [str(run), "pretrain", "--config", "my paper", f"output_dir={run}"]
    done = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, check=False)
    assert done.returncode == code
    resume = " --resume" if is_begun else ""
    expected = [f"{n} {n} 2 node7 20041: pretrain --config my paper output_dir={run}{resume}" for n in (0, 1)]
    assert calls.read_text().splitlines() == expected + (["scontrol requeue 41"] if code == 143 else [])
