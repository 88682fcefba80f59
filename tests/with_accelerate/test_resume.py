"""save_state and load_state: a resumed run is the uninterrupted one, bitwise."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from support.accelerate_cpu import fresh
from support.logged import board_entries
from support.malformed import REFUSED, answer, malformed
from torch import nn

import accelerate_clip
from gradclip import (
    AlarmConfig,
    AlarmError,
    ClipByNorm,
    ClipConfig,
    ConfigError,
    LogConfig,
    RecorderConfig,
    ZClip,
)

POLICY = ZClip(warmup_steps=5)


def start(policy=POLICY, **options):
    fresh()
    accelerator = Accelerator(cpu=True, **options)
    clip = None if policy is None else accelerate_clip.enable(accelerator, policy)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.02))
    return accelerator, clip, model, opt


def train(accelerator, clip, model, opt, steps):
    seen = []
    for step in steps:
        inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        spike = 50.0 if step % 9 == 8 else 1.0
        opt.zero_grad()
        accelerator.backward((model(inputs) - 1).square().mean() * spike)
        opt.step()
        seen.append((clip.last_record.limit, clip.last_record.clip_rate))
    return seen


def test_the_next_fifty_steps_are_bitwise_those_of_an_uninterrupted_run(tmp_path):
    whole = start()
    train(*whole, range(20))
    whole[0].save_state(tmp_path)
    straight = train(*whole, range(20, 70))
    parameters = [p.detach().clone() for p in whole[2].parameters()]
    assert float(straight[-1][1]) > 0

    resumed = start()
    resumed[0].load_state(tmp_path)
    assert resumed[1].steps[0] == 20
    assert train(*resumed, range(20, 70)) == straight
    assert all(map(torch.equal, parameters, resumed[2].parameters()))
    assert resumed[1].steps[0] == 70

    forgetful = start()
    (tmp_path / "gradient_clip.bin").unlink()
    forgetful[0].load_state(tmp_path)
    assert train(*forgetful, range(20, 70)) != straight


def test_what_is_left_is_given_and_written_before_a_rewind(tmp_path):
    config = ClipConfig(policies=[POLICY], recorder=RecorderConfig())
    ours = start(config, log_with="tensorboard", project_dir=tmp_path)
    accelerator, clip, _, _ = ours
    accelerator.init_trackers("run")
    train(*ours, range(12))
    accelerator.save_state(tmp_path / "saved")
    train(*ours, range(12, 17))
    accelerator.load_state(tmp_path / "saved")
    train(*ours, range(12, 14))
    accelerator.end_training()
    scalars, _ = board_entries(tmp_path / "run")
    assert list(scalars) == [10, 17, 14]
    assert clip.steps[0] == 14
    for file, steps in (("gradclip", range(17)), ("gradclip-1", range(12, 14))):
        _, *rows = (tmp_path / f"{file}.trace.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(steps)


def test_an_alarm_names_the_state_that_was_saved_or_loaded_before(tmp_path):
    alarm = AlarmConfig(warmup_steps=8, stop="rise")
    config = ClipConfig(policies=[POLICY], alarm=alarm, log=LogConfig(every_n_steps=5))
    for first in (0, 30):
        accelerator, clip, model, opt = start(config)
        told = []
        clip.on_spike(told.append)
        if first:
            accelerator.load_state(tmp_path / "30")
        inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        for step in range(first, 46):
            opt.zero_grad()
            scale = 1e6 if step >= 40 else 1.0
            accelerator.backward((model(inputs) - 1).square().mean() * scale)
            if step < 45:
                opt.step()
            if not first and step in (29, 41):
                accelerator.save_state(tmp_path / str(step + 1))
        with pytest.raises(AlarmError, match="exit code 76") as error:
            opt.step()
        assert [(spike.kind, spike.step) for spike in told] == [("rise", 40)]
        assert error.value.checkpoint == told[0].checkpoint == str(tmp_path / "30")


def test_checkpoints_move_freely_to_and_from_runs_without_gradclip(tmp_path, caplog):
    stock = start(policy=None)
    stock[0].save_state(tmp_path / "stock")
    ours = start()
    ours[0].load_state(tmp_path / "stock")
    assert "it was saved without gradclip. Clipping starts with fresh state" in caplog.text
    train(*ours, range(3))
    ours[0].save_state(tmp_path / "ours")
    start(policy=None)[0].load_state(tmp_path / "ours")


def test_state_of_other_policies_or_optimizers_is_refused(tmp_path):
    ours = start()
    ours[0].save_state(tmp_path)
    way_out = rf"of policies .* Delete {tmp_path}/gradient_clip\.bin to start with fresh state\."
    with pytest.raises(ConfigError, match=way_out):
        start(ClipByNorm(max_norm=1.0))[0].load_state(tmp_path)
    accelerator, clip, _, _ = start()
    other = nn.Linear(4, 1)
    accelerator.prepare(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="is of 1 optimizers, this run has 2"):
        clip.load_state_dict(ours[1].state_dict())
    shutil.rmtree(tmp_path)


def test_a_state_that_is_not_as_it_was_saved_names_file_and_key_and_changes_nothing(tmp_path):
    """Nor are trackers told anything, or model and optimizer loaded."""
    ours = start(ClipConfig(policies=[POLICY]), log_with="tensorboard", project_dir=tmp_path)
    accelerator, clip, model, _ = ours
    other = nn.Linear(4, 1)
    accelerator.prepare(other, torch.optim.SGD(other.parameters(), lr=0.1))
    accelerator.init_trackers("run")
    train(*ours, range(7))
    accelerator.save_state(tmp_path / "saved")
    train(*ours, range(7, 9))
    before = repr(clip.state_dict())
    for where, state in malformed(clip.state_dict()):
        found = answer(clip.load_state_dict, state)
        assert found.startswith((REFUSED, "ConfigError: The saved clip state")), (where, found)
    file = tmp_path / "saved" / "gradient_clip.bin"
    saved, weights = torch.load(file, weights_only=True), [p.clone() for p in model.parameters()]
    saved["clippers"][1]["counts"]["steps"].fill_(-1.0)
    torch.save(saved, file)
    way_out = rf"counts\.steps is -1; allowed: .*clippers\[1\].* Delete {file} to start with fresh"
    with pytest.raises(ConfigError, match=way_out):
        accelerator.load_state(tmp_path / "saved")
    whole = file.read_bytes()
    for content in (b"", b"{}", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{file} can't be read .*delete this one to start"):
            accelerator.load_state(tmp_path / "saved")
    assert repr(clip.state_dict()) == before
    assert clip.steps == [9, 0]
    assert all(map(torch.equal, weights, model.parameters()))
    train(*ours, range(9, 11))
    accelerator.end_training()
    assert list(board_entries(tmp_path / "run")[0]) == [10, 11]


def seen_by_name(clipper):
    entry = clipper.state_dict()["policies"][0]
    return dict(zip(entry["slots"], entry["state"]["seen"].tolist(), strict=True))


@pytest.mark.parametrize("lets_go", [True, False], ids=["free_memory", "beside the other"])
@pytest.mark.parametrize("parts", [(0, 1), (1, 0), (1, 1)], ids=["more", "fewer", "as many"])
def test_an_optimizer_prepared_anew_goes_on_by_name(parts, lets_go):
    """As after unfreezing; the script asks for the norm of all parameters."""
    fresh()
    accelerator = Accelerator(cpu=True)
    policy = ZClip(warmup_steps=3, scope="parameter", max_norm=None)
    clip = accelerate_clip.enable(accelerator, policy)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))

    def run(trains_first, steps):
        free = [p for p in model.parameters() if p is not model[0].bias or trains_first]
        opt = accelerator.prepare(torch.optim.SGD(free, lr=0.0))
        for _ in range(steps):
            accelerator.backward(model(torch.ones(2, 4)).square().mean())
            held = torch.cat([p.grad.flatten() for p in free])
            norm = accelerator.clip_grad_norm_(free, float("inf"))
            torch.testing.assert_close(float(norm), float(held.norm()), rtol=1e-6, atol=0)
            opt.step()
            model.zero_grad()

    accelerator.prepare(model)
    run(parts[0], 5)
    if lets_go:
        accelerator.free_memory()
        accelerator.prepare(model)
    run(parts[1], 4)
    new = clip.clippers[-1]
    assert len(clip.clippers) == (1 if lets_go else 2)
    assert clip.steps[-1] == new.state_dict()["counts"]["steps"] == 9
    always = dict.fromkeys(["0.weight", "1.weight", "1.bias"], 9)
    assert seen_by_name(new) == always | ({"0.bias": 4 + 5 * parts[0]} if parts[1] else {})


def test_another_model_that_is_prepared_starts_fresh():
    """Its parameters have the same names, as in the next fold of a cross-validation."""
    ours = start()
    train(*ours, range(5))
    accelerator, clip = ours[:2]
    accelerator.free_memory()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    assert clip.steps == [0]
    assert seen_by_name(clip.clippers[0]) == {"global": 0}
