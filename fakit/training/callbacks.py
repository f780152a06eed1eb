"""What `DistillationTrainer` does at the beginning of a training, an epoch and a step."""

from collections.abc import Callable

from transformers import TrainerCallback

from fakit.objective.objective import Objective


class EpochCallback(TrainerCallback):
    """A random layer map is drawn anew at every epoch's start,
    or every `steps` where the data are laid out in one epoch.
    """

    def __init__(self, objective: Objective):
        self.objective = objective
        self.steps: int | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.steps is None:
            self.objective.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        if self.steps is not None:
            self.objective.set_epoch(state.global_step // self.steps)


class ScheduleCallback(TrainerCallback):
    """Every schedule at its number of the optimizer step, the same for all of its micro-batches."""

    def __init__(self, objective: Objective):
        self.objective = objective

    def on_train_begin(self, args, state, control, **kwargs):
        self.objective.check_schedules(state.max_steps)
        self.on_step_begin(args, state, control)

    def on_step_begin(self, args, state, control, **kwargs):
        self.objective.set_step(state.global_step, of=state.max_steps)


class StandardizationCallback(TrainerCallback):
    """Gathers what terms standardize and choose units by before the first step, where they ask for it and it is not
    there yet.
    """

    def __init__(self, gather: Callable[[], None]):
        self.gather = gather

    def on_train_begin(self, args, state, control, **kwargs):
        self.gather()
