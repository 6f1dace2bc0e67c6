"""Distillation: the image-text similarities of a frozen teacher as soft targets of the contrastive logits."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput, no_autocast
from mmbert.model.tokens import Reads
from mmbert.runtime.distributed import all_gather, global_mean


class TeacherDistillation(Objective):
    """Knowledge distillation (arXiv:1503.02531, Sec. 2) of image-text similarities from a teacher with an ITC head.

    The loss is the Kullback-Leibler divergence of ITC's softmax over the batch from the teacher's, the mean of both
    directions, as for the soft targets of ALBEF (arXiv:2107.07651, Sec. 3.3) but with a fixed teacher instead of a
    momentum model, which `optim.momentum_distillation` has. The teacher is no part of the model: `mmbert.fit` computes
    its vectors of the training images, without augmentation, and captions once; a batch brings those of its rows.
    """

    reads: Mapping[str, Reads] = {"clean": Reads()}
    requires = ("itc",)

    def __init__(self, config: MMBertConfig, *, teacher: str | None = None, temperature: float | None = None):
        """Check the options; there are no parameters.

        Args:
            config: The model's configuration.
            teacher: Folder or hub name of the teacher, a saved or imported mmbert model with the objective itc.
            temperature: Temperature of the teacher's softmax. None: the one that the teacher learned.

        Raises:
            UsageError: An option that is not allowed.
        """
        super().__init__()
        self.check_options(teacher=teacher, temperature=temperature)
        self.teacher, self.temperature = teacher, temperature

    @classmethod
    def check_options(cls, *, teacher: Any = None, temperature: Any = None) -> None:
        """Check the values of the options.

        Raises:
            UsageError: A value that is not allowed.
        """
        if teacher is not None and (not isinstance(teacher, str) or not teacher):
            raise UsageError(f"objectives.distill.teacher={teacher!r}: must be the folder of a saved mmbert model.")
        is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if temperature is not None and not (is_number and 0 < temperature < math.inf):
            raise UsageError(f"objectives.distill.temperature={temperature!r}: must be a number above 0, or null.")

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Compute the loss; reads `teacher_image` and `teacher_text` (B, E), whose products are the teacher's logits.

        The accuracy is the fraction of texts whose most similar image is that of the teacher.
        """
        if "teacher_text" not in encoded.batch:
            raise UsageError(
                "objectives.distill: the batch has no vectors of the teacher; mmbert.fit computes those of its "
                "training data. Leave the objective out elsewhere."
            )
        assert encoded.contrast is not None
        image, text = encoded.batch["teacher_image"], encoded.batch["teacher_text"]
        of_student = encoded.contrast.both_logits(encoded)
        with no_autocast(text):
            of_teacher = text @ all_gather(image).T, image @ all_gather(text).T  # (B, B * world size) each
            total = divergence(of_teacher[0], of_student[0]) + divergence(of_teacher[1], of_student[1])
        count = torch.tensor(len(text), device=text.device)
        return ObjectiveOutput(
            global_mean(total / 2, count), of_student[0].detach(), of_teacher[0].argmax(dim=1), torch.zeros_like(count)
        )


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum over rows of the KL divergence of the student's softmax from the teacher's, given (B, N) logits of both."""
    return F.kl_div(student.log_softmax(dim=1), teacher.log_softmax(dim=1), reduction="sum", log_target=True)
