"""accelerate-clip launch: one YAML, unchanged scripts, real processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import ClusterConfig
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from accelerate_clip import launch, run
from gradclip import (
    ClipByNorm,
    ClipByValue,
    ClipConfig,
    ConfigError,
    GroupConfig,
    LogConfig,
    SkipNonfinite,
    ZClip,
    as_config,
    load_section,
)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("train.py")
STOCK = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2, "debug": False}
ASKED = {"mixed_precision": "no", "use_cpu": True, "debug": False}
SECTION = """
gradient_clip_config:
  policies:
    - {type: norm, max_norm: 0.25}
"""


def write(folder, section=SECTION, **stock):
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump(STOCK | stock) + section, encoding="utf-8")
    return str(file)


def started(arguments, **variables):
    """Run the command in a process of its own, as a user does."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


@pytest.fixture
def handed_over(monkeypatch):
    """What accelerate's own launcher is given, instead of starting it."""
    seen = {}

    def take(arguments):
        seen["arguments"] = arguments
        seen["yaml"] = yaml.safe_load(Path(arguments.config_file).read_text())
        seen["clip"] = as_config(json.loads(os.environ[run.CONFIG_VARIABLE]))
        seen["use_cpu"] = os.environ.get("ACCELERATE_USE_CPU")

    monkeypatch.setattr(launch, "launch_command", take)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    return seen


def test_two_processes_run_an_unchanged_script_clipped(tmp_path):
    command = ["-m", "accelerate_clip.launch", "launch", "--config_file", write(tmp_path)]
    done = started([*command, "--main_process_port", "0", SCRIPT, tmp_path])
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in (0, 1))
    assert first["processes"] == 2
    assert first["kind"] == "DistributedType.MULTI_CPU"
    assert first["norms"] == second["norms"] == pytest.approx([0.25, 0.25], rel=1e-4)
    assert first["weights"] == second["weights"]
    assert first["seen"] != second["seen"]
    assert done.stderr.count("called with max_norm=1000000000.0; the gradclip configuration") == 1


ALARM = """
gradient_clip_config:
  policies: [{type: norm, max_norm: 1.0}]
  alarm: {warmup_steps: 20, stop: rise}
"""
RISES = """
import torch
from accelerate import Accelerator
accelerator = Accelerator()
model = torch.nn.Linear(2, 1)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-4))
for step in range(100):
    optimizer.zero_grad()
    accelerator.backward(model(torch.full((2,), 10.0 if step >= 50 else 1.0)).sum())
    optimizer.step()
"""


def test_the_launcher_ends_with_the_exit_code_of_an_alarm(tmp_path):
    (tmp_path / "rises.py").write_text(RISES, encoding="utf-8")
    file = write(tmp_path, ALARM, distributed_type="NO", num_processes=1)
    command = ["-m", "accelerate_clip.launch", "launch", "--config_file", file]
    done = started([*command, tmp_path / "rises.py"])
    assert done.returncode == 76, done.stderr
    assert done.stderr.count("have risen since step 50") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("code", "ends"), [(76, SystemExit), (1, ChildFailedError)])
def test_several_processes_are_no_different_and_other_failures_are_errors(
    tmp_path, monkeypatch, code, ends
):
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="<N/A>")

    def fail(_):
        raise ChildFailedError("script.py", {0: failure})

    monkeypatch.setattr(launch, "launch_command", fail)
    with pytest.raises(ends) as error:
        launch.main(["launch", "--config_file", write(tmp_path), "script.py"])
    assert ends is not SystemExit or error.value.code == code


def test_run_alone_serves_spawned_workers_and_the_path_of_a_file(tmp_path):
    config = tmp_path / "clip.yaml"
    config.write_text("policies:\n  - {type: norm, max_norm: 0.25}\n", encoding="utf-8")
    command = ["-m", "accelerate_clip.run", SCRIPT, tmp_path, "--workers", "1"]
    done = started(command, ACCELERATE_CLIP_CONFIG=str(config), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "rank0.json").read_text())
    assert report["seen"] == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    assert report["norms"] == pytest.approx([0.25] * 4, rel=1e-4)


def in_this_process(monkeypatch, arguments, config):
    monkeypatch.setenv(run.CONFIG_VARIABLE, config)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    run.main(arguments)


PROBE = """
import sys, json
from pathlib import Path
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
found = [sys.argv[1:], sys.path[0], __name__, accelerator.gradient_clip.config.model_dump()]
Path(sys.argv[1]).write_text(json.dumps(found))
"""


def test_scripts_and_modules_run_as_python_would_run_them(tmp_path, monkeypatch):
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    out = str(tmp_path / "out")
    config = {"policies": [{"type": "norm", "max_norm": 0.25}]}
    expected = as_config(config).model_dump()
    with monkeypatch.context() as context:
        in_this_process(context, [str(tmp_path / "probe.py"), out, "-m"], json.dumps(config))
    assert json.loads(Path(out).read_text()) == [
        [out, "-m"],
        str(tmp_path),
        "__main__",
        expected,
    ]
    assert not hasattr(Accelerator.__init__, "__wrapped__")  # undone at the script's end
    with monkeypatch.context() as context:
        context.syspath_prepend(str(tmp_path))
        in_this_process(context, ["-m", "probe", out], json.dumps(config["policies"]))
    assert json.loads(Path(out).read_text())[2:] == ["__main__", expected]


def test_run_says_what_is_wrong_with_the_variable(monkeypatch):
    for config, message in {
        "": "environment variable ACCELERATE_CLIP_CONFIG is not set",
        "{policies": "which isn't JSON",
        '{"policies": []}': "at least one policy is needed",
        '[{"type": "nrm"}]': r"policies\[0\]\.type is 'nrm'",
        "nowhere.yaml": "nowhere.yaml: the file can't be read",
    }.items():
        with pytest.raises(SystemExit, match=message):
            in_this_process(monkeypatch, ["train.py"], config)
        assert not hasattr(Accelerator.__init__, "__wrapped__")


def test_run_without_a_script_shows_its_usage(monkeypatch):
    with pytest.raises(SystemExit, match=r"usage: python -m accelerate_clip\.run script\.py"):
        in_this_process(monkeypatch, [], "{}")


def test_the_section_is_taken_out_and_handed_over(tmp_path, handed_over):
    section = """
gradient_clip_config:
  policies:
    - {type: zclip, decay: 9e-1}
    - {type: norm, max_norm: .inf}
  log: {every_n_steps: 3}
"""
    file = write(tmp_path, section)
    before = Path(file).read_text()
    launch.main(["launch", "--config_file", file, "--mixed_precision", "bf16", "a.py", "--lr", "1"])
    assert handed_over["yaml"] == STOCK
    assert handed_over["clip"] == load_section(file, launch.SECTION)
    assert handed_over["clip"].policies == [ZClip(decay=0.9), ClipByNorm(max_norm=float("inf"))]
    arguments = handed_over["arguments"]
    assert arguments.mixed_precision == "bf16"
    assert arguments.module
    assert arguments.training_script == "accelerate_clip.run"
    assert arguments.training_script_args == ["a.py", "--lr", "1"]
    assert Path(file).read_text() == before
    assert not Path(arguments.config_file).exists()
    assert run.CONFIG_VARIABLE not in os.environ
    launch.main(["launch", "--config_file", file, "-m", "pkg.train", "-m"])
    assert handed_over["arguments"].training_script_args == ["-m", "pkg.train", "-m"]


def test_the_default_file_is_accelerates_own(tmp_path, handed_over, monkeypatch):
    monkeypatch.setattr(launch, "default_config_file", write(tmp_path))
    launch.main(["launch", "a.py"])
    assert handed_over["yaml"] == STOCK
    monkeypatch.setattr(launch, "default_config_file", tmp_path / "none.yaml")
    with pytest.raises(SystemExit, match=r"No --config_file is given and .*none\.yaml doesn't"):
        launch.main(["launch", "a.py"])


def test_a_configuration_survives_the_environment():
    policies = [SkipNonfinite(), ZClip(clip_factor=0.7), ClipByNorm(max_norm=math.inf, eps=1e-9)]
    config = ClipConfig(
        policies=[*policies, ClipByValue(clip_value=0.1)],
        on_nonfinite="raise",
        groups=[GroupConfig(match="*.embed*", policies=[ClipByNorm(max_norm=0.5)])],
        log=LogConfig(every_n_steps=7, per_parameter=True),
    )
    assert as_config(json.loads(json.dumps(config.model_dump()))) == config


ONE = "starts ONE on the CPU this way; for several put 'distributed_type: MULTI_GPU'"
MPI = {"distributed_type": "MULTI_CPU", "mpirun_config": {"mpirun_hostfile": "hosts"}}


def test_processes_on_the_cpu(tmp_path, handed_over, capsys):
    """Which learn that they are on the CPU, and where a single one would start, which is told."""
    for stock, flags, cpu, told in (
        ({}, [], "true", ""),
        ({"use_cpu": False}, [], None, ""),
        ({"distributed_type": "NO", "num_processes": 1}, [], "true", ""),
        ({"distributed_type": "NO"}, ["--multi_gpu"], "true", ""),
        ({"distributed_type": "MULTI_CPU"}, ["--mpirun_hostfile", "hosts"], "true", ""),
        (MPI, [], "true", ""),
        ({"distributed_type": "MULTI_CPU"}, [], "true", ONE),
        ({"distributed_type": "NO"}, [], "true", ONE),
        ({}, ["--cpu"], None, ONE),
        ({"num_processes": 1}, ["--cpu", "--num_processes", "3"], None, ONE),
    ):
        launch.main(["launch", "--config_file", write(tmp_path, **stock), *flags, "a.py"])
        assert handed_over["use_cpu"] == cpu, (stock, flags)
        said = capsys.readouterr().err
        assert told in said, (stock, flags)
        assert said.count("\n") == bool(told), (stock, flags)


WRONG = {
    "": r"yaml: the section 'gradient_clip_config' is missing\. Add it, for instance:\n",
    SECTION.replace("clip_config", "clipping_config"): (
        r"yaml, line 6: found 'gradient_clipping_config': the section 'gradient_clip_config'"
    ),
    SECTION.replace("max_norm", "max_nrm"): (
        r"yaml, line 8: policies\[0\]\.max_nrm is not a known key; did you mean 'max_norm'"
    ),
    SECTION.replace("{type: norm", "{type: nrm"): (
        r"yaml, line 8: policies\[0\]\.type is 'nrm'; did you mean 'norm'"
    ),
    SECTION.replace("policies", "policy"): r"yaml, line 7: policy is not a known key",
    "gradient_clip_config: zclp": r"yaml, line \d+: zclp: .*did you mean 'zclip'",
    "gradient_clip_config: 1.0": "found 1.0; a mapping with the key 'policies' is needed",
}


def test_a_wrong_section_is_an_error_with_its_line(tmp_path, handed_over):
    for section, message in WRONG.items():
        with pytest.raises(SystemExit, match=message):
            launch.main(["launch", "--config_file", write(tmp_path, section), "a.py"])
    assert not handed_over


def test_what_accelerate_misses_in_the_rest_is_said_of_the_users_file(tmp_path, handed_over):
    file = tmp_path / "clip.yaml"
    for stock, message in {
        "": r"clip\.yaml, beside .*`distributed_type` must be specified.*: 'NO'",
        "distributed_type: MULTI_CPUS\n": r"clip\.yaml, beside .*'MULTI_CPUS' is not a valid",
        "distributed_type: 'NO'\nnum_gpus: 2\n": r"clip\.yaml, .* at it had .*\['num_gpus'\]",
    }.items():
        file.write_text(stock + SECTION, encoding="utf-8")
        with pytest.raises(SystemExit, match=message):
            launch.main(["launch", "--config_file", str(file), "a.py"])
    assert not handed_over


def test_the_suggested_section_works(tmp_path, handed_over):
    with pytest.raises(SystemExit) as stopped:
        launch.main(["launch", "--config_file", write(tmp_path, ""), "a.py"])
    suggested = str(stopped.value).split("for instance:")[1]
    launch.main(["launch", "--config_file", write(tmp_path, suggested), "a.py"])
    assert handed_over["clip"] == ClipConfig(policies=[ClipByNorm(max_norm=1.0)])


def test_what_would_run_otherwise_is_refused(tmp_path, handed_over):
    for stock, flags, message in (
        ({}, ["--no_python"], "--no_python runs a program"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, [], "on SageMaker"),
        ({"distributed_type": "XLA"}, [], "On XLA"),
        ({}, ["--tpu"], "On XLA"),
        ({"distributed_type": "FSDP"}, [], "shards nothing on the CPU"),
        ({}, ["--use_fsdp"], "shards nothing on the CPU"),
    ):
        with pytest.raises(SystemExit, match=message):
            launch.main(["launch", "--config_file", write(tmp_path, **stock), *flags, "a.py"])
    assert not handed_over


def test_usage(capsys):
    launch.main(["--help"])
    assert "accelerate-clip launch --config_file FILE" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        launch.main(["train.py"])
    assert stopped.value.code == 2
    assert "usage: accelerate-clip launch" in capsys.readouterr().err


def test_shipped_files_hold_a_section_and_stock_keys(handed_over):
    from accelerate.commands.config.config_args import ClusterConfig

    files = list((ROOT / "configs/accelerate").glob("*.yaml"))
    assert files
    for file in files:
        launch.main(["launch", "--config_file", str(file), "a.py"])
        assert set(handed_over["yaml"]) <= set(ClusterConfig.__dataclass_fields__)


def test_a_section_can_be_read_on_its_own(tmp_path):
    file = write(tmp_path)
    assert load_section(file, "gradient_clip_config").policies == [ClipByNorm(max_norm=0.25)]
    with pytest.raises(ConfigError, match="the section 'clip' is missing"):
        load_section(file, "clip")


def test_config_asks_accelerates_questions_then_ours_and_launch_takes_the_file(
    tmp_path, monkeypatch, capsys, handed_over
):
    answers = iter(["zclp", "zclip"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    stock = ClusterConfig(compute_environment="LOCAL_MACHINE", distributed_type="NO", **ASKED)
    monkeypatch.setattr("accelerate.commands.config.config.get_user_input", lambda: stock)
    monkeypatch.chdir(tmp_path)
    launch.main(["config"])
    said = capsys.readouterr().out
    assert "zclp isn't in the list" in said
    assert "accelerate-clip launch --config_file accelerate_clip.yaml train.py" in said
    assert load_section("accelerate_clip.yaml", launch.SECTION) == as_config("zclip")
    launch.main(["launch", "--config_file", "accelerate_clip.yaml", "a.py"])
    assert handed_over["clip"] == as_config("zclip")
    assert handed_over["yaml"]["mixed_precision"] == "no"
    with pytest.raises(SystemExit, match=r"allowed: a name in \.yaml"):
        launch.main(["config", "--config_file", "accelerate.json"])


def test_env_shows_what_a_bug_report_needs(tmp_path, capsys):
    file = write(tmp_path)
    launch.main(["env", "--config_file", file])
    said = capsys.readouterr().out
    assert "- distributed_type: MULTI_GPU" in said  # accelerate's own
    assert f"- torch: {torch.__version__}" in said
    assert '- gradient_clip_config: {"policies":[{"type":"norm","max_norm":0.25}]}' in said
    launch.main(["env", "--config_file", write(tmp_path, section="")])
    assert "the section 'gradient_clip_config' is missing" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="can't be read"):
        launch.main(["env", "--config_file", str(tmp_path / "nowhere.yaml")])
