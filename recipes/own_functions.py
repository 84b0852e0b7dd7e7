"""An aggregator, a loss, an assignment and a rejection of one's own, after `accelerate launch recipes/train.py`."""

import torch

from hf_cosupervise import CoSupervisedConfig, CoSupervisedTrainer, PseudolabelPool, aggregated_pool


def median(teacher_probs, answered):  # all teachers (n, teachers, labels) into one pseudolabel (n, labels)
    middle = teacher_probs.masked_fill(~answered.unsqueeze(2), torch.nan).nanmedian(dim=1).values
    return middle / middle.sum(dim=1, keepdim=True)


def brier(logits, pseudolabels, rows):  # one loss per example (n,)
    return (logits.softmax(dim=1) - pseudolabels).square().sum(dim=1)


def backer(student_log_probs, teacher_probs, answered):  # the teacher of each example (n,): who backs the student most
    backing = (teacher_probs * student_log_probs.exp().unsqueeze(1)).sum(dim=2)
    return torch.where(answered.any(dim=1), backing.masked_fill(~answered, -1).argmax(dim=1), -1)


def overlap(student_log_probs, pseudolabels):  # what is kept (n,)
    return torch.minimum(student_log_probs.exp(), pseudolabels).sum(dim=1) > 0.2


pool, student = PseudolabelPool.load("outputs/digits/_run/seed-0/pool"), "outputs/digits/_run/seed-0/student-start"
own = {"loss_func": brier, "assign_func": backer, "keep_func": overlap}
CoSupervisedTrainer(student, CoSupervisedConfig("mine", learning_rate=3e-3), pool=pool, **own).train()
single = CoSupervisedTrainer(student, CoSupervisedConfig("median"), pool=aggregated_pool(pool, median))
print(single.train().global_step, "steps on the median of", pool.hierarchy)
