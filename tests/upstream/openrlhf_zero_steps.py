"""OpenRLHF 0.11.2: `--ckpt.save_steps 0` and `--logger.logging_steps 0` end the run with a ZeroDivisionError after its first step

Likewise `--eval.steps 0` with an evaluation set, in the loop of `PPOTrainer.fit`. For "never", -1 is taken; 0 is not refused.

Expected: never, or an error before anything is loaded.
"""

import sys
from types import SimpleNamespace

from openrlhf.trainer.ppo_trainer import BasePPOTrainer

failed = []
for logging_steps, save_steps in ((0, 1), (1, 0)):
    arguments = SimpleNamespace(logger=SimpleNamespace(logging_steps=logging_steps), ckpt=SimpleNamespace(save_steps=save_steps))
    trainer = SimpleNamespace(args=arguments, wandb_logger=None, tensorboard_logger=None)
    try:
        BasePPOTrainer.save_logs_and_checkpoints(trainer, global_step=1)
    except ZeroDivisionError as error:
        failed.append((logging_steps, save_steps))
        print(f"--logger.logging_steps {logging_steps} --ckpt.save_steps {save_steps}: {error!r}")
if not failed:
    sys.exit("not reproduced")
