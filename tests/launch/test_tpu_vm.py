"""launch/tpu_vm.sh against a stand-in for gcloud that keeps a VM's state in files and runs its workers here."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GCLOUD = r"""#!/usr/bin/env bash
# gcloud compute tpus (tpu-vm | queued-resources) VERB NAME FLAGS...
said=$*
echo "${said//$'\n'/ }" >> "$CLOUD/said"
kind=$3 verb=$4
for argument; do case $argument in --command=*) command=${argument#--command=} ;; esac; done
case $kind-$verb in
  *-describe) cat "$CLOUD/$kind" 2>/dev/null || exit 1 ;;
  queued-resources-create) echo ACTIVE > "$CLOUD/$kind"; echo READY > "$CLOUD/tpu-vm" ;;
  *-delete) rm "$CLOUD/$kind" ;;
  tpu-vm-scp)
    mkdir -p "$CLOUD/home/roserag_jax" && ln -sfn "$VENV" "$CLOUD/home/roserag_jax/.venv"
    cp "$5" "$CLOUD/home/roserag_jax.tar.gz" ;;
  tpu-vm-ssh)
    case $command in *setup_tpu_vm*) command=${command%%&& roserag_jax/launch*} ;; esac
    cd "$CLOUD/home" && HOME=$CLOUD/home bash -c "$command"
    status=$?
    # The first time, the VM is preempted under the command.
    if [ -e "$CLOUD/preempt" ] && [[ $command == *tail* ]]; then
      rm "$CLOUD/preempt"; echo PREEMPTED > "$CLOUD/tpu-vm"; exit 255
    fi
    exit $status ;;
esac
"""


@pytest.fixture
def tpu_vm(tmp_path):
    """A function that runs `tpu_vm.sh`, and the folder of what is in the cloud."""
    cloud, virtual = tmp_path / "cloud", tmp_path / "venv"
    (cloud / "home").mkdir(parents=True)
    (virtual / "bin").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gcloud").write_text(GCLOUD)
    (tmp_path / "bin/gcloud").chmod(0o755)
    # The command itself: shows what it was told, and ends with the status that it finds.
    (virtual / "bin/python").write_text('#!/bin/sh\necho "$@"\nexit "$(cat "$CLOUD/status")"\n')
    (virtual / "bin/python").chmod(0o755)
    (cloud / "status").write_text("0")
    environment = {
        "NAME": "mine",
        "ZONE": "us-west4-a",
        "TYPE": "v5litepod-16",
        "RUNTIME": "v2-alpha-tpuv5-lite",
        "POLL": "0.2",
        "CLOUD": str(cloud),
        "VENV": str(virtual),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }

    def run(*arguments, **changes):
        line = ["bash", str(ROOT / "launch/tpu_vm.sh"), *arguments]
        environ = {**os.environ, **environment, **changes}
        return subprocess.run(line, capture_output=True, text=True, timeout=40, env=environ)

    return run, cloud


def test_run_from_nothing_through_a_preemption_to_the_end(tpu_vm):
    run, cloud = tpu_vm
    (cloud / "preempt").touch()
    done = run("run", "train", "--config", "configs/gemma2b.py", "--config.workdir=gs://b/a b")
    assert done.returncode == 0, done.stderr
    said = (cloud / "said").read_text().splitlines()
    verbs = [line.split()[2:4] for line in said if "describe" not in line]
    whole = [["queued-resources", "create"], ["tpu-vm", "scp"], ["tpu-vm", "ssh"], ["tpu-vm", "ssh"], ["tpu-vm", "ssh"]]
    assert verbs == [*whole, ["tpu-vm", "delete"], ["queued-resources", "delete"], *whole]
    assert all("--zone=us-west4-a" in line for line in said)
    (create, _) = [line for line in said if "queued-resources create" in line]
    assert "--node-id=mine --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot" in create
    everywhere = [line for line in said if "scp" in line or "local.py" in line]
    assert len(everywhere) == 4 and all("--worker=all" in line for line in everywhere)
    expected = "launch/local.py --restarts 20 -- train --config configs/gemma2b.py --config.workdir=gs://b/a b"
    assert f"{expected} --config.distributed=auto\n" in done.stdout  # the log, followed


@pytest.mark.parametrize("status", [1, 2, 143])
def test_run_ends_with_the_commands_status_on_a_vm_that_exists(tpu_vm, status):
    run, cloud = tpu_vm
    (cloud / "tpu-vm").write_text("READY")
    (cloud / "status").write_text(str(status))
    done = run("run", "train")
    said = (cloud / "said").read_text()
    assert done.returncode == status and "queued-resources create" not in said and said.count("scp") == 1


def test_says_what_is_missing(tpu_vm):
    run, cloud = tpu_vm
    done = run("create", ZONE="")
    assert done.returncode == 2 and done.stderr == "error: set NAME and ZONE\n"
    assert run("create", TYPE="").stderr.startswith("error: set TYPE")
    assert run("start").stderr.startswith("error: name a command") or run("start").returncode == 2
    done = run("--help")
    assert done.returncode == 0 and "launch/tpu_vm.sh run train" in done.stdout and "set -e" not in done.stdout
    assert run("fly").returncode == 2
