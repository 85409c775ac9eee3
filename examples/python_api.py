"""The quickstart without the command line.

python examples/python_api.py [STUDENT TEACHER OUT STEPS]
"""

import sys

import lightning as L

from opd_lightning import (
    OPDDataModule,
    OPDModule,
    RolloutCallback,
    SamplingConfig,
    SpecialTokenMask,
    TopKReverseKL,
    run_loggers,
)

student, teacher, out, steps = sys.argv[1:] or [
    "models/student",
    "models/teacher",
    "runs/python",
    20,
]

module = OPDModule(
    student, teacher, TopKReverseKL(k=32, tail="bucket"), weights=[SpecialTokenMask()]
)
data = OPDDataModule(train="examples/prompts/everyday.jsonl", prompts_per_step=16)
rollout = RolloutCallback(SamplingConfig(top_p=0.9, max_completion_length=24))
trainer = L.Trainer(max_steps=int(steps), callbacks=[rollout], logger=run_loggers(out))
trainer.fit(module, data)
module.export(f"{out}/student")
