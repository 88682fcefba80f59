"""LightningCLI: the same configuration by class_path, with our own words for what is wrong."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from support.lit import Small

from gradclip import ClipByNorm, ConfigError, Schedule, ZClip
from gradclip.tools.check import check_file
from lightning_clip import GradientClip

# Lightning 2.6 calls jsonargparse by names that jsonargparse 4.53 deprecates, and jsonargparse
# warns of a policy within the arguments of a class, which it can't print.
pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*Unable to serialize instance"),
]

EXAMPLE = Path(__file__).parents[2] / "configs" / "lightning_cli.yaml"
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


class Module(Small):
    def __init__(self) -> None:
        super().__init__()


class Data(LightningDataModule):
    def train_dataloader(self):
        return range(5)


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])


def cli(*args, run=True):
    return LightningCLI(Module, Data, args=list(args), run=run, save_config_callback=None)


def callback_of(made):
    [clip] = [c for c in made.trainer.callbacks if isinstance(c, GradientClip)]
    return clip


def config_file(folder, policy, **arguments):
    path = folder / "cli.yaml"
    arguments["policy"] = policy
    callback = {"class_path": "lightning_clip.GradientClip", "init_args": arguments}
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    return path


def test_the_example_trains_and_clips():
    made = cli("fit", f"--config={EXAMPLE}", *QUIET, "--trainer.max_steps=3")
    clip = callback_of(made)
    assert [policy.type for policy in clip.config.policies] == ["auto", "norm"]
    assert clip.clippers[0].state_dict()["counts"]["steps"] == 3


def test_a_path_in_the_configuration_and_on_the_command_line(tmp_path):
    file = tmp_path / "zclip.yaml"
    file.write_text("policies:\n  - type: zclip\n    eps: 1e-7\n")
    made = cli(f"--config={config_file(tmp_path, str(file))}", *QUIET, run=False)
    assert callback_of(made).config.policies == [ZClip(eps=1e-7)]
    made = cli(
        "--trainer.callbacks+=lightning_clip.GradientClip",
        f"--trainer.callbacks.policy={file}",
        "--trainer.callbacks.progress_bar=true",
        *QUIET,
        run=False,
    )
    assert callback_of(made).config.policies == [ZClip(eps=1e-7)]


SCHEDULE = {"schedule": "cosine", "start": 4.0, "end": 0.5, "steps": 2}


def test_a_schedule_and_a_late_policy_train(tmp_path):
    policies = [{"type": "norm", "max_norm": SCHEDULE}, {"type": "zclip", "after": 2}]
    path = config_file(tmp_path, {"policies": policies})
    clip = callback_of(cli("fit", f"--config={path}", *QUIET, "--trainer.max_steps=3"))
    [clipper] = clip.clippers
    assert clip.config.policies == [ClipByNorm(max_norm=Schedule(**SCHEDULE)), ZClip(after=2)]
    assert clipper.last_record.limit == 0.5
    assert clipper.state_dict()["policies"][1]["state"]["seen"] == 1


def test_what_print_config_prints_is_read_back(tmp_path, capsys):
    limits = [{"type": "norm", "max_norm": 2.0}, {"type": "norm", "max_norm": SCHEDULE}]
    policy = {"policies": limits, "log": {"every_n_steps": 5}}
    with pytest.raises(SystemExit):
        cli(f"--config={config_file(tmp_path, policy)}", "--print_config", *QUIET, run=False)
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    clip = callback_of(cli(f"--config={printed}", run=False))
    assert clip.config.policies == [
        ClipByNorm(max_norm=2.0),
        ClipByNorm(max_norm=Schedule(**SCHEDULE)),
    ]
    assert clip.config.log.every_n_steps == 5


WRONG = [
    (
        {"policies": [{"type": "zclip", "decy": 0.9}]},
        "policies[0].decy is not a known key; did you mean 'decay'?",
    ),
    (
        {"policies": [{"type": "zclip", "decay": "fast"}]},
        "policies[0].decay is 'fast'; it must be a valid number",
    ),
    (
        {"policies": [{"type": "norm", "max_norm": {**SCHEDULE, "strat": 1.0}}]},
        "policies[0].max_norm.strat is not a known key; did you mean 'start'?",
    ),
    (
        {"policies": [{"type": "norm", "max_norm": {**SCHEDULE, "schedule": "cosin"}}]},
        "policies[0].max_norm.schedule is 'cosin'; allowed: 'linear', 'cosine' or",
    ),
    ({"policies": [{"type": "zclp"}]}, "policies[0].type is 'zclp'; did you mean 'zclip'?"),
    ({"polices": []}, "polices is not a known key; did you mean 'policies'?"),
    (3, "policy is 3; allowed: a policy such as Auto()"),
    ("nowhere.yaml", "nowhere.yaml: the file can't be read"),
]


def test_errors_are_in_our_words(tmp_path):
    for policy, message in WRONG:
        with pytest.raises(SystemExit, match=re.escape(message)) as ended:
            cli(f"--config={config_file(tmp_path, policy)}", *QUIET, run=False)
        assert ended.value.code.count("\n") < 5


@pytest.mark.parametrize("form", ["--config={}", "-c {}"])
def test_an_error_names_the_line_of_the_file(form, tmp_path, monkeypatch):
    """Of the file on the command line; the program ends with that alone."""
    for policy, message in WRONG[:6]:
        path = config_file(tmp_path, policy)
        lines = path.read_text().splitlines()
        words = form.format(path).split()
        monkeypatch.setattr(sys, "argv", ["train.py", *words, *QUIET])
        with pytest.raises(SystemExit, match=re.escape(message)) as ended:
            LightningCLI(Module, Data, run=False, save_config_callback=None)
        line = int(re.match(rf"error: {path}, line (\d+): ", ended.value.code)[1])
        assert message.split()[0].split(".")[-1] in lines[line - 1]


def test_other_callers_get_the_error():
    """Also where the command line has such a file: only LightningCLI's program ends."""
    with pytest.raises(ConfigError, match="did you mean 'zclip'"):
        GradientClip({"type": "zclp"})


def test_help_shows_every_policy_and_its_settings(capsys):
    with pytest.raises(SystemExit):
        cli("--trainer.callbacks.help=lightning_clip.GradientClip", run=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "norm: " in shown
    assert "z_threshold=2.5" in shown
    assert "max_carry=10.0" in shown


ZCLIP = {"class_path": "gradclip.ZClip", "init_args": {"decay": 0.9}}
NORM = {"class_path": "gradclip.policies.fixed.ClipByNorm", "init_args": {"max_norm": 1.0}}
PLAIN = {"type": "norm", "max_norm": 1.0}
LOG = {"class_path": "gradclip.LogConfig", "init_args": {"every_n_steps": 3}}
BY_CLASS = {
    "a policy": {"policy": ZCLIP},
    "without arguments": {"policy": {"class_path": "gradclip.ZClip"}},
    "other arguments": {"policy": {"class_path": "gradclip.ZClip", "dict_kwargs": {"decay": 0.9}}},
    "a list": {"policy": [ZCLIP, NORM]},
    "a configuration": {
        "policy": {"class_path": "gradclip.ClipConfig", "init_args": {"policies": [PLAIN]}}
    },
    "within a mapping": {"policy": {"policies": [ZCLIP, PLAIN], "log": LOG}},
    "a class in arguments": {
        "policy": {"class_path": "gradclip.ClipConfig", "init_args": {"policies": [ZCLIP]}}
    },
    "mappings without policies": {"policy": [PLAIN]},
    "one mapping": {"policy": PLAIN},
    "a list of both": {"policy": [ZCLIP, PLAIN]},
    "a flag in words": {"policy": ZCLIP, "progress_bar": "yes"},
    "an empty flag": {"policy": ZCLIP, "progress_bar": None},
}
NOT_BY_CLASS = {
    "a short name": {"policy": {"class_path": "ZClip"}},
    "another class": {"policy": {"class_path": "torch.nn.ReLU"}},
    "an argument it doesn't have": {
        "policy": {"class_path": "gradclip.ZClip", "init_args": {"decy": 1}}
    },
    "no flag": {"policy": ZCLIP, "progress_bar": "maybe"},
    "a number for a flag": {"policy": ZCLIP, "restore": 7},
}


def test_check_reads_a_class_path_as_the_cli_does(tmp_path):
    for name, arguments in BY_CLASS.items():
        path = config_file(tmp_path, **arguments)
        checked = check_file(path)
        assert checked.fault is None, name
        [config] = checked.configs.values()
        assert config == callback_of(cli(f"--config={path}", *QUIET, run=False)).config, name


def test_check_refuses_what_the_cli_refuses(tmp_path):
    for name, arguments in NOT_BY_CLASS.items():
        path = config_file(tmp_path, **arguments)
        assert check_file(path).fault is not None, name
        with pytest.raises((ValueError, SystemExit)):
            cli(f"--config={path}", *QUIET, run=False)


def test_no_class_but_ours_is_imported_or_called(tmp_path, monkeypatch, subtests):
    (tmp_path / "strange_module.py").write_text("open('was_imported', 'w')\nclass ZClip: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    call = {"class_path": "os.mkdir", "init_args": {"path": "was_called"}}
    imported = {"class_path": "strange_module.ZClip"}
    places = {
        "policy": lambda strange: strange,
        "a list": lambda strange: [ZCLIP, strange],
        "policies": lambda strange: {"policies": [PLAIN, strange]},
        "a value": lambda strange: {"policies": [{"type": "norm", "max_norm": strange}]},
        "arguments": lambda strange: {
            "class_path": "gradclip.ClipConfig",
            "init_args": {"policies": [PLAIN], "log": strange},
        },
    }
    for place, put in places.items():
        for strange in (call, imported):
            with subtests.test(place, **strange):
                path = config_file(tmp_path, put(strange))
                assert "gradclip.ClipByNorm" in check_file(path).fault
                with pytest.raises(SystemExit, match=r"class_path is '.*gradclip\.ClipByNorm"):
                    cli(f"--config={path}", *QUIET, run=False)
                assert not list(tmp_path.glob("was_*"))


def test_check_knows_the_keys_of_a_class_path(tmp_path):
    path = config_file(tmp_path, ZCLIP)
    content = yaml.safe_load(path.read_text())
    [callback] = content["trainer"]["callbacks"]
    for more in ({"dict_kwargs": {"foo": 1}}, {"foo": 1}):
        content["trainer"]["callbacks"] = [{**callback, **more}]
        path.write_text(yaml.safe_dump(content))
        assert "foo is not a known key" in check_file(path).fault
        with pytest.raises((ValueError, SystemExit)):
            cli(f"--config={path}", *QUIET, run=False)


def test_an_unknown_argument_is_refused(tmp_path, capsys):
    path = config_file(tmp_path, {"policies": [{"type": "zclip"}]}, progres_bar=True)
    with pytest.raises(SystemExit):
        cli(f"--config={path}", *QUIET, run=False)
    assert "progres_bar" in capsys.readouterr().err
