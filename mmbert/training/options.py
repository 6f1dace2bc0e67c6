"""Options of the sections `optim` and `checkpoint`."""

from dataclasses import dataclass

from mmbert.errors import UsageError

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(kw_only=True)
class OptimOptions:
    """How the weights are moved."""

    lr: float = 1e-4
    """Peak learning rate; each part's is this times its factor."""
    text_lr_factor: float = 1.0
    """Factor on `lr` for the text encoder."""
    image_lr_factor: float = 1.0
    """Factor on `lr` for the image encoder."""
    fusion_lr_factor: float = 1.0
    """Factor on `lr` for the fusion part and the projections into it."""
    head_lr_factor: float = 1.0
    """Factor on `lr` for the heads of objectives or task."""
    weight_decay: float = 0.01
    """Decoupled weight decay; none on biases, norms and other vectors."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's averaging coefficients."""
    warmup: float = 0.1
    """Linear warm-up, as a fraction of all optimizer steps."""
    schedule: str = "cosine"
    """What follows the warm-up: cosine, linear or constant."""
    final_lr: float = 0.0
    """Learning rate at the last step, as a fraction of the peak."""
    freeze_text: int | str = "none"
    """What of the text encoder stays as it is: none, all, or n for the embeddings and the first n layers."""
    freeze_image: int | str = "none"
    """The same for the image encoder."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile."""

    def check(self) -> None:
        """Refuses what can't be meant.

        Raises:
            UsageError: A value out of range.
        """
        if self.schedule not in SCHEDULES:
            raise UsageError(f"optim.schedule='{self.schedule}'; allowed are {', '.join(SCHEDULES)}.")
        if not self.lr > 0:
            raise UsageError(f"optim.lr={self.lr}: must be above 0.")
        for name in ("warmup", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"optim.{name}={getattr(self, name)}: a fraction from 0 to 1.")


@dataclass(kw_only=True)
class CheckpointOptions:
    """What is kept of a run, and how often."""

    monitor: str | None = None
    """The validation result that chooses the best checkpoint. None: the task's accuracy; in pretraining ITM's AUROC,
    without ITM what comes first of R@1 and the accuracy on masked words. Of losses and median ranks less is better, of
    all others more."""
    every_n_steps: int | None = None
    """Optimizer steps between checkpoints. None: every 10 steps up to step 120, then by time."""
    every_seconds: float = 30.0
    """Seconds between checkpoints, where `every_n_steps` does not say."""

    def check(self) -> None:
        """Refuses what can't be meant.

        Raises:
            UsageError: A value out of range.
        """
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise UsageError(f"checkpoint.every_n_steps={self.every_n_steps}: must be 1 or more.")
        if self.every_seconds < 0:
            raise UsageError(f"checkpoint.every_seconds={self.every_seconds}: must be 0 or more.")
