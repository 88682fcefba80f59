"""`schedule_on_skip`: whether the learning rate's schedule waits while steps are withheld."""

import functools

import pytest
import torch
from support.lit import NAN, NOTHING, Small, inputs, scaled, trainer_of

from gradclip import ConfigError
from lightning_clip import GradientClip


class Scheduled(Small):
    """Halves its learning rate; writes down which it had at the end of each batch."""

    def __init__(self, interval="step", frequency=1, optimizer=torch.optim.SGD):
        super().__init__()
        self.options = {"interval": interval, "frequency": frequency}
        self.make_optimizer = functools.partial(optimizer, lr=1.0)
        self.rates = []

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return [optimizer], [{"scheduler": schedule, **self.options}]

    def loss(self, rows):
        return super().loss(rows) * 1e-3

    def on_train_batch_end(self, *_):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


def fit(module, batches, how, **options):
    policy = {"policies": [{"type": "norm", "max_norm": 1.0}], "schedule_on_skip": how}
    clip = GradientClip(policy)
    trainer_of(clip, **options).fit(module, batches)
    return module.rates


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("how", ["hold", "advance", None])
def test_the_schedule_counts_steps_that_were_taken_or_all(how):
    batches = [NAN, 0, NAN, 1, NAN, NAN, 2]
    taken, want = 0, []
    for batch in batches:
        taken += batch != NAN or how != "hold"
        want.append(0.5**taken)
    assert fit(Scheduled(), batches, how) == want


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("fused", [False, True])
def test_it_waits_while_a_scaler_finds_its_scale(fused):
    plugin = scaled(2.0**40)
    module = Scheduled(optimizer=functools.partial(torch.optim.AdamW, fused=fused))
    rates = fit(module, range(40), "hold", plugins=[plugin])
    backed_off = 40 - int(torch.tensor(plugin.scaler.get_scale()).log2())
    assert backed_off > 1
    assert rates[backed_off - 1 :] == [0.5**i for i in range(41 - backed_off)]


@pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler.step:UserWarning",
    "ignore:.*training_step. returned .None.:UserWarning",
)
@pytest.mark.parametrize("scale", [None, 2.0])
def test_a_batch_that_made_no_step_was_not_withheld(scale):
    plugins = [] if scale is None else [scaled(scale)]
    batches = [0, NAN, NOTHING, NOTHING, 1]
    assert fit(Scheduled(), batches, "hold", plugins=plugins) == [0.5, 0.5, 0.25, 0.125, 0.0625]


def test_it_waits_at_whole_steps_when_batches_are_accumulated():
    batches = [0, 1, 2, NAN, 3, 4]
    assert fit(Scheduled(), batches, "hold", accumulate_grad_batches=2)[1::2] == [0.5, 0.5, 0.25]


def test_a_schedule_of_epochs_goes_on():
    rates = fit(Scheduled("epoch"), [0, NAN], "hold", max_epochs=3)
    assert rates == [1.0, 0.5, 0.5, 0.25, 0.25, 0.125]  # it moves before the last batch ends


class Hooked(Scheduled):
    def lr_scheduler_step(self, scheduler, metric):
        self.calls = getattr(self, "calls", 0) + 1
        super().lr_scheduler_step(scheduler, metric)


def test_the_module_s_own_hook_is_called_and_given_back():
    module = Hooked()
    assert fit(module, [0, NAN, 1], "hold") == [0.5, 0.5, 0.25]
    assert module.calls == 2
    assert "lr_scheduler_step" not in vars(module)
    module.lr_scheduler_step = own = functools.partial(Hooked.lr_scheduler_step, module)
    module.rates.clear()
    assert fit(module, [0, NAN, 1], "hold") == [0.5, 0.5, 0.25]
    assert module.lr_scheduler_step is own


class Fails(Scheduled):
    def on_train_batch_end(self, *_):
        raise RuntimeError("stop")


def test_it_is_given_back_after_an_error_too():
    module = Fails()
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, [0], "hold")
    assert "lr_scheduler_step" not in vars(module)


class ByHand(Scheduled):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, _):
        self.manual_backward(self.loss(inputs(batch)))
        self.optimizers().step()


def test_what_could_not_be_held_is_refused():
    with pytest.raises(ConfigError, match=r"ByHand steps its schedules by itself.*last_record"):
        fit(ByHand(), [0], "hold")
    with pytest.raises(ConfigError, match=r"StepLR\) has interval 'step' and frequency 2"):
        fit(Scheduled(frequency=2), [0], "hold")
    fit(ByHand(), [0], "advance")
    assert fit(Scheduled(frequency=2), [0, NAN], None) == [1.0, 0.5]
