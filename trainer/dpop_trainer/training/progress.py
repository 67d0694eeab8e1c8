"""The progress bar of a run: steps, time left, loss, and what happens to the chosen answers."""

from tqdm.auto import tqdm
from transformers import TrainerCallback

from dpop_trainer.report.signed import minus

# metric -> how it is called on the bar
SHOWN = {
    "loss": "loss",
    "dpop/chosen_logratio": "chosen Δ",
    "dpop/rejected_logratio": "rejected Δ",
    "dpop/active_fraction": "active",
    "eval_loss": "eval loss",
}


class RunProgress(TrainerCallback):
    """One bar per run on the main process; the latest metrics stand behind it instead of scrolling by.

    Args:
        desc: what stands before the bar.
    """

    def __init__(self, desc: str = "Training") -> None:
        self._desc = desc
        self._bar: tqdm | None = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self._desc, dynamic_ncols=True, disable=None
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._bar is not None:
            self._shown |= {name: minus(f"{logs[key]:.3g}") for key, name in SHOWN.items() if logs and key in logs}
            self._bar.set_postfix(self._shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()
            self._bar = None
