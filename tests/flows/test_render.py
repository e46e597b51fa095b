"""`python -m flows render`: what would be started."""

import pytest
import yaml

from flows.__main__ import main

CLUSTER = "{image: train:1, claim: store, mount_path: MOUNT}"


def rendered(capsys, tmp_path, stage, *settings):
    words = ["render", stage, "--preset", "smoke", "--store", str(tmp_path / "store")]
    for setting in settings:
        words += ["--set", f"resources.{stage.replace('-', '_')}.{setting}"]
    status = main(words)
    return status, capsys.readouterr()


def test_a_local_stage_is_a_command_line_with_inputs_that_are_not_there_yet(capsys, tmp_path):
    status, shown = rendered(capsys, tmp_path, "train-base", "threads=3")
    assert status == 0
    reason, command = shown.out.splitlines()
    assert reason.startswith("# 1 process of 3 threads: ")
    assert command.startswith("OMP_NUM_THREADS=3 ")
    assert f"-m gigagan.training --config {tmp_path}/store/train-base/KEY/config.json" in shown.out
    assert f"--shards {tmp_path}/store/filter/KEY/shards/032" in shown.out
    assert not (tmp_path / "store").exists()


def test_a_slurm_stage_is_a_batch_script(capsys, tmp_path):
    _, shown = rendered(capsys, tmp_path, "train-upsampler", "backend=slurm", "nodes=2")
    assert "#SBATCH --nodes=2" in shown.out
    assert "-m gigagan.training" in shown.out


def test_a_kubernetes_stage_is_a_trainjob(capsys, tmp_path):
    asked = CLUSTER.replace("MOUNT", str(tmp_path))
    _, shown = rendered(capsys, tmp_path, "evaluate", f"kubernetes={asked}", "backend=kubernetes")
    tree = yaml.safe_load(shown.out)
    assert tree["kind"] == "TrainJob"
    assert "evaluate" in tree["spec"]["trainer"]["command"]


@pytest.mark.parametrize("stage", ["download", "score", "filter"])
def test_a_data_stage_starts_no_process(capsys, tmp_path, stage):
    status, shown = rendered(capsys, tmp_path, stage)
    assert status == 1
    assert "works in the pipeline's own process" in shown.err
