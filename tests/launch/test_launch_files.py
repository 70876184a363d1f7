"""The files of launch/, each read by the tool that it is for; nothing is started anywhere."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def run(*command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tool(name):
    return shutil.which(name) or pytest.skip(f"{name} is not installed (make test-launch installs it)")


def jobset(manifest):
    """A JobSet through the models of its API; what they do not know, or know differently, is an error."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    spec = dict(manifest)
    assert (spec.pop("apiVersion"), spec.pop("kind")) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    read = models.JobsetV1alpha2JobSet.from_dict(manifest)
    assert read.to_dict() == manifest
    return read.spec


def restarted(spec):
    """The statuses of those that matter after which a JobSet starts its pods again."""
    failed = {"FailJobSet": ["PodFailurePolicy"]}
    assert {rule.action: rule.on_job_failure_reasons for rule in spec.failure_policy.rules} == failed
    job = spec.replicated_jobs[0].template.spec
    (rule,) = job.pod_failure_policy.rules
    assert rule.action == "FailJob" and job.backoff_limit == 0 and spec.failure_policy.max_restarts > 0
    assert rule.on_exit_codes.container_name == job.template.spec.containers[0].name
    holds = {
        "In": lambda code: code in rule.on_exit_codes.values,
        "NotIn": lambda c: c not in rule.on_exit_codes.values,
    }
    return {code for code in (1, 2, 134, 143) if not holds[rule.on_exit_codes.operator](code)}


def test_shell_scripts():
    run(tool("shellcheck"), *map(str, [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]))


def test_dockerfile_and_what_it_copies():
    run(tool("hadolint"), str(LAUNCH / "Dockerfile"))
    kept = set(re.findall(r"^!(.+)$", (LAUNCH / "Dockerfile.dockerignore").read_text(), re.M))
    copied = re.findall(r"^COPY (.+) \S+$", (LAUNCH / "Dockerfile").read_text(), re.M)
    assert {name for line in copied for name in line.split()} == kept and all((ROOT / name).exists() for name in kept)


def test_jobset_restarts_what_passes_by_itself_alone():
    yaml = pytest.importorskip("yaml")
    spec = jobset(yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text()))
    assert restarted(spec) == {134, 143}
    job = spec.replicated_jobs[0].template.spec
    pod = job.template.spec
    chips = int(pod.containers[0].resources.limits["google.com/tpu"].actual_instance)
    rows, columns = map(int, pod.node_selector["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job.parallelism * chips == job.completions * chips == rows * columns
    assert "--config.distributed=auto" in pod.containers[0].args


def test_xpk_command_of_the_readme(tmp_path):
    """XPK's own dry run writes a JobSet for the same hosts that restarts on the same statuses."""
    xpk, yaml = tool("xpk"), pytest.importorskip("yaml")
    command = re.search(r"xpk workload create (.+?)\n\n", (LAUNCH / "README.md").read_text(), re.S).group(1)
    command = command.replace("\\\n", " ").split("```")[0]
    offline = "--dry-run --skip-validation --no-dependency-auto-download --project=p"
    out = tmp_path / "jobset.yaml"
    run("bash", "-c", f"{xpk} workload create {offline} --output-manifest-file={out} {command}", HOME=str(tmp_path))
    made = yaml.safe_load(out.read_text())
    models = pytest.importorskip("kubeflow_trainer_api.models")
    spec = models.JobsetV1alpha2JobSet.from_dict(made).spec
    assert restarted(spec) == {134, 143} and spec.replicated_jobs[0].template.spec.parallelism == 4
    assert "--config.distributed=auto" in spec.replicated_jobs[0].template.spec.template.spec.containers[0].command[-1]


@pytest.mark.parametrize("name", ["sky_tpu.yaml", "sky_gpu.yaml"])
def test_sky_task(name, monkeypatch):
    yaml = pytest.importorskip("yaml")
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml_config(yaml.safe_load((LAUNCH / name).read_text()), env_overrides=[("BUCKET", "mine")])
    (resources,) = task.resources
    assert resources.use_spot and resources.job_recovery["recover_on_exit_codes"] == [134, 143]
    # The command line that each host comes to, with a program that shows its arguments for Python.
    script = task.run.replace(".venv/bin/python", "printf '%s\\n'")
    told = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    said = run("bash", "-euc", script, **task.envs, **told).split()
    where = "auto" if name == "sky_tpu.yaml" else "10.0.0.1:8476,2,1"
    assert said[:3] == ["launch/local.py", "--", "train"] and f"--config.distributed={where}" in said
    assert "--config.workdir=gs://mine/roserag" in said and (ROOT / said[said.index("--config") + 1]).exists()


# Directives that the script may use, and what their values look like.
SBATCH = {
    "job-name": r"\w+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "time": r"\d+:\d\d:\d\d",
    "requeue": None,
    "open-mode": r"append|truncate",
    "output": r"\S+%j\S*",
    "signal": r"TERM@\d+",  # without `B:`, so that the command gets it and not the script
}


@pytest.mark.parametrize("status, requeued", [(0, False), (1, False), (2, False), (134, True), (143, True)])
def test_slurm_script(tmp_path, status, requeued):
    """Its directives, and what it does with the command's status; srun and scontrol are stood in for by scripts."""
    script = LAUNCH / "slurm.sbatch"
    for name, value in re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.M):
        assert re.fullmatch(SBATCH[name], value) if SBATCH[name] else not value, name
    for program, behind in (("srun", f"exit {status}"), ("scontrol", "")):
        (tmp_path / program).write_text(f'#!/bin/sh\necho {program} "$@" >> {tmp_path}/said\n{behind}\n')
        (tmp_path / program).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
    line = ["bash", str(script), "train", "--config", "configs/gemma2b.py"]
    done = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    said = (tmp_path / "said").read_text().splitlines()
    assert done.returncode == status and ("scontrol requeue 7" in said) == requeued
    assert said[0].endswith("-m roserag_jax.train --config configs/gemma2b.py --config.distributed=auto")
